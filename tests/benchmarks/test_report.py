"""scripts/benchmark: the arithmetic between what was measured and what is printed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "report.py"
SPEC = importlib.util.spec_from_file_location("benchmark_report", FILE)
report = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = report  # its dataclass looks itself up
SPEC.loader.exec_module(report)


def test_warm_up_and_the_saving_step_are_left_out():
    assert report.settled([9.0, 9.0, 9.0, 1.0, 2.0, 7.0], warm_up=3, last=1) == [1.0, 2.0]


def test_nothing_left_to_measure_is_an_error():
    with pytest.raises(ValueError, match="4 steps leave none after 3 \\+ 1"):
        report.settled([1.0] * 4, warm_up=3, last=1)


def test_a_rate_is_amount_over_the_median_second():
    assert report.rate(256, [0.5, 0.5, 60.0]) == 512.0


def test_a_ratio_compares_within_rounds_so_a_slow_round_does_not_tilt_it():
    ours, theirs = [400.0, 40.0, 420.0], [200.0, 20.0, 210.0]  # all was slow in the second round
    assert report.ratio(ours, theirs) == 2.0


def test_a_ratio_above_one_means_ours_is_larger():
    assert report.ratio([3.0], [2.0]) == 1.5


def test_a_ratio_of_different_numbers_of_rounds_is_refused():
    with pytest.raises(ValueError, match="zip"):
        report.ratio([1.0, 2.0], [1.0])


def test_shares_add_up_to_one_with_the_rest():
    parts = report.shares({"gen": 1.0, "learn": 2.0}, total=4.0)
    assert parts == {"gen": 0.25, "learn": 0.5, "everything else": 0.25}


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), ("hf", "hf"), (91414.2, "91,414"), (1.6574, "1.66"), (0.0123, "0.0123")],
)
def test_numbers_have_three_digits_and_nothing_is_a_dash(cell, text):
    assert report.shown(cell) == text


def test_a_table_aligns_words_left_and_numbers_right():
    table = report.Report(title="T", columns=["engine", "x"], rows=[["hf", 2000.0], ["vllm", None]])
    lines = report.as_text(table).splitlines()
    assert lines[2:6] == [
        "| engine |     x |",
        "|--------|------:|",
        "| hf     | 2,000 |",
        "| vllm   |     - |",
    ]


def test_json_keeps_full_precision_and_the_single_measurements():
    table = report.Report(title="T", columns=["x"], rows=[[1.23456]], raw={"rounds": [1, 2]})
    (found,) = json.loads(json.dumps(report.as_json("here", [table])))["reports"]
    assert found["rows"] == [{"x": 1.23456}]
    assert found["raw"] == {"rounds": [1, 2]}
