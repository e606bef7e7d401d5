"""docs/placement.md is what the calculator says now, and its commands work as they are written."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

from llmac.cli import main
from llmac.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("make_placement", ROOT / "docs" / "make_placement.py")
make_placement = importlib.util.module_from_spec(SPEC)
PAGE = ROOT / "docs" / "placement.md"


@pytest.fixture(scope="module", autouse=True)
def generator():
    sys.modules[SPEC.name] = make_placement  # dataclasses look their module up there
    SPEC.loader.exec_module(make_placement)
    yield
    del sys.modules[SPEC.name]


def commands(start):
    """Those of the page's code blocks whose line starts like this, without a leading $."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(start)]
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def test_the_page_is_up_to_date():
    text = PAGE.read_text()
    assert text == make_placement.page(text), "run: python docs/make_placement.py"


def test_a_number_that_is_edited_by_hand_is_noticed():
    text = PAGE.read_text()
    wrong = text.replace("| 1 | 1.5B | grpo |", "| 1 | 1.6B | grpo |")
    assert wrong != text
    assert make_placement.page(wrong) == text


def test_an_example_prints_what_the_page_shows(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = PAGE.read_text()
    examples = commands("$ llmac plan")
    assert len(examples) == len(make_placement.WRITTEN_OUT)
    for command in examples:
        code = main(command[1:])
        printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
        assert f"$ {shlex.join(command)}\n{printed}\n" in text
        assert code == (0 if printed.endswith("\nfits") else 3)


def test_every_placement_fits_by_its_own_command(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    listed = [c for c in commands("llmac plan") if "placement_models" in shlex.join(c)]
    assert len(listed) == sum(map(len, make_placement.PLACEMENTS.values()))
    for command in listed:
        assert main(command[1:]) == 0, capsys.readouterr().out


def test_every_launch_line_names_files_that_exist_and_a_recipe_that_loads():
    lines = commands("accelerate launch")
    assert lines
    for words in lines:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        at = words.index("recipes/train.py")
        load_recipe(ROOT / words[at + 1], words[at + 2 :])
