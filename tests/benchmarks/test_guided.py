"""scripts/benchmark guided: the table of all seeds, of settings that only some have too."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def guided():
    """The part as a module; its neighbours import each other by bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import guided

        yield guided
    finally:
        sys.path.remove(str(FOLDER))


def setting(name, accuracy, tokens):
    same = {"method": "vote", "setting": name, "states": 0, "cpu_ms": 2.0}
    return {**same, "accuracy": accuracy, "tokens": tokens}


def test_rows_are_means_over_the_seeds_that_have_them(guided):
    lines = [
        {"date": "2026-01-02", "settings": [setting("n 2", 0.5, 10.0), setting("n 4", 0.25, 30.0)]},
        {"date": "2026-01-01", "settings": [setting("n 2", 0.7, 20.0)]},
    ]
    report = guided.table(lines)
    assert report.rows == [
        ["vote", "n 2", 2, ".600 ± .100", 15.0, 0, 2.0],
        ["vote", "n 4", 1, ".250", 30.0, 0, 2.0],
    ]
    assert len(report.columns) == len(report.rows[0])
    assert "2026-01-01 to 2026-01-02" in report.notes[0]
