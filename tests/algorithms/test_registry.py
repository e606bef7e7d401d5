"""The registry names real cards, and docs/algorithms.md tells the truth about each."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.base import Algorithm

from .making import card_class

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the table below a heading, by the text of their first cell."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in (rows[0], *rows[2:])}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_name_is_a_card(name):
    assert issubclass(card_class(name), Algorithm)
    assert card_class(name)().group_size >= 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_card_has_a_row_with_its_paper_file_and_tests(name):
    row = table("Cards")[name]
    module = ALGORITHMS[name].split(":")[0]
    file = module.replace(".", "/") + ".py"
    assert f"`{file}`" in row
    assert (ROOT / file).is_file()
    assert any("arXiv:" in cell for cell in row)
    assert all(row), f"an empty cell in the row of {name}"


def test_no_row_is_without_a_card():
    assert set(table("Cards")) - {"card"} == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_defaults_on_the_page_are_the_defaults_in_the_code(name):
    rows = table("Defaults")
    column = rows["field"].index(f"`{name}`")
    on_page = {
        field: cells[column] for field, cells in rows.items() if field != "field" and cells[column]
    }
    in_code = {f.name: f.default for f in dataclasses.fields(card_class(name))}
    assert on_page == {field: str(default) for field, default in in_code.items()}


def test_every_field_has_a_source_on_the_page():
    fields = {f.name for name in ALGORITHMS for f in dataclasses.fields(card_class(name))}
    assert fields <= set(table("Sources of the defaults"))


def test_cards_import_torch_and_jaxtyping_and_nothing_heavier():
    program = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from llmac.algorithms import ALGORITHMS\n"
        "assert 'torch' not in sys.modules\n"
        "for target in ALGORITHMS.values(): importlib.import_module(target.split(':')[0])\n"
        "heavy = {'transformers', 'accelerate', 'vllm', 'peft', 'deepspeed', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "ours = {m for m in sys.modules if m.startswith('llmac.')}\n"
        "print(sorted(m for m in ours if m.split('.')[1] not in ('core', 'algorithms')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
