"""Who may know whom: the light parts stay light, and each heavy library has one owner."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "llmac").rglob("*.py"))

INSIDE_VLLM = "llmac/engines/vllm_transfer.py"
"""A part of vLLM's workers: they import it by the name that `vllm_launch.py` gives them."""
OWNERS = {
    "accelerate": "llmac/runtime/",
    "deepspeed": "llmac/runtime/",
    "vllm": "llmac/engines/vllm_",
}


def loaded_by(statement):
    """Top-level names in `sys.modules` after a fresh interpreter has run `statement`."""
    program = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


def imported_in(tree):
    """(top-level name, whether it is imported when the module is) of every import."""
    deferred = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            yield name.partition(".")[0], node not in deferred


def is_for_types(node):
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def test_importing_llmac_loads_no_torch():
    loaded = loaded_by("import llmac")
    assert "llmac" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "accelerate", "datasets", "pydantic"}


def test_core_and_algorithms_load_torch_and_no_other_framework():
    loaded = loaded_by("import llmac, llmac.core, llmac.algorithms")
    cards = "import pkgutil, importlib, llmac.core, llmac.algorithms; " + (
        "[importlib.import_module(f'{p.__name__}.{m.name}') "
        "for p in (llmac.core, llmac.algorithms) for m in pkgutil.iter_modules(p.__path__)]"
    )
    loaded |= loaded_by(cards)
    assert "torch" in loaded
    heavy = {"transformers", "accelerate", "vllm", "deepspeed", "peft", "datasets", "pydantic"}
    assert not loaded & heavy


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_one_owner(library):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name == library for name, _ in imported_in(ast.parse(path.read_text())))
    }
    assert [user for user in sorted(users) if not user.startswith(OWNERS[library])] == []


@pytest.mark.parametrize("library", ["vllm", "deepspeed"])
def test_an_optional_library_is_imported_at_use(library):
    at_once = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if (library, True) in imported_in(ast.parse(path.read_text()))
    ]
    assert at_once == ([INSIDE_VLLM] if library == "vllm" else [])


def test_what_runs_inside_vllm_is_imported_by_nobody_else():
    module = INSIDE_VLLM.removesuffix(".py").replace("/", ".")
    users = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if f"import {module.rpartition('.')[2]}" in path.read_text()
        or f"from {module}" in path.read_text()
    ]
    assert users == []


def test_the_import_scanner_sees_what_it_looks_for():
    tree = ast.parse(
        "import a.b\nfrom c.d import e\nfrom . import f\n"
        "if TYPE_CHECKING:\n    import g\n\ndef h():\n    from i import j\n"
    )
    assert set(imported_in(tree)) == {("a", True), ("c", True), ("g", False), ("i", False)}


def test_reward_functions_import_nothing_of_llmac():
    for path in sorted((ROOT / "reward_fns").glob("*.py")):
        assert "llmac" not in {name for name, _ in imported_in(ast.parse(path.read_text()))}, path


def test_import_contracts_hold():
    pytest.importorskip("importlinter")
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout
