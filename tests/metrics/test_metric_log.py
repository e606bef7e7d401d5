"""One JSON line a step, exact over ranks, unique over resumes."""

import json
import logging
import math

import pytest
import torch

from llmac.core.measures import Last, Max, Mean, Sum
from llmac.errors import DataError
from llmac.metrics import MetricLog, read_metrics


class Ranks:
    """This rank among others whose measures are given; counts the collectives."""

    def __init__(self, *others, is_main=True):
        self.is_main = is_main
        self.others = others
        self.gathered = 0
        self.tracked = []

    def gather(self, item):
        self.gathered += 1
        return [item, *self.others]

    def track(self, metrics, step):
        self.tracked.append((step, dict(metrics)))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines(output):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (output / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_ranks_with_different_names_are_combined_in_one_collective(tmp_path):
    other = {"a": Mean(1.0, 3.0), "only_there": Sum(4.0), "timing_s/step": Max(7.0)}
    ranks = Ranks(other)
    log = MetricLog(tmp_path, ranks)
    log.add({"a": Mean(5.0, 1.0), "only_here": Max(2.0)})
    values = log.flush(1)
    # (5 + 1) / (1 + 3), not (5/1 + 1/3) / 2
    assert values["a"] == 1.5
    assert (values["only_here"], values["only_there"]) == (2.0, 4.0)
    assert values["timing_s/step"] == 7.0
    assert ranks.gathered == 1
    assert lines(tmp_path) == [{"step": 1, **values}]
    assert log.latest == values


def test_a_mean_over_nothing_is_left_out_unless_another_rank_has_something(tmp_path):
    log = MetricLog(tmp_path, Ranks({"there": Mean(3.0, 2.0), "nowhere": Mean(0.0, 0.0)}))
    log.add({"there": Mean(0.0, 0.0), "nowhere": Mean(0.0, 0.0)})
    assert {"there": 1.5}.items() <= log.flush(1).items()
    assert "nowhere" not in lines(tmp_path)[0]


def test_two_parts_of_a_step_are_weighted_not_averaged(tmp_path):
    log = MetricLog(tmp_path, Ranks())
    log.add({"a": Mean(3.0, 1.0), "l": Last(1.0)})
    log.add({"a": Mean(0.0, 2.0), "l": Last(2.0)}, {"n": Sum(1.0)})
    values = log.flush(1)
    assert (values["a"], values["l"], values["n"]) == (1.0, 2.0, 1.0)


def test_a_flushed_step_leaves_nothing_for_the_next(tmp_path):
    log = MetricLog(tmp_path, Ranks())
    log.add({"n": Sum(1.0)})
    log.flush(1)
    assert "n" not in log.flush(2)


def test_a_reduction_that_differs_between_ranks_is_named(tmp_path):
    log = MetricLog(tmp_path, Ranks({"n": Mean(1.0)}))
    log.add({"n": Sum(1.0)})
    with pytest.raises(TypeError, match="metric n"):
        log.flush(1)


def test_tensors_become_numbers_and_keep_no_graph(tmp_path):
    weight = torch.tensor(2.0, requires_grad=True)
    log = MetricLog(tmp_path, Ranks())
    log.add({"loss": Mean(weight * 3, torch.tensor(2)), "most": Max(torch.tensor([4.0]))})
    values = log.flush(1)
    assert (values["loss"], values["most"]) == (3.0, 4.0)
    assert all(type(value) is float for value in values.values())


def test_a_metric_that_is_many_numbers_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"metric a .*\(2,\)"):
        MetricLog(tmp_path, Ranks()).add({"a": Sum(torch.zeros(2))})


def test_nan_and_infinity_are_null_and_warned_of_once_by_name(tmp_path, caplog):
    ranks = Ranks()
    log = MetricLog(tmp_path, ranks)
    with caplog.at_level(logging.WARNING, logger="llmac.metrics"):
        for step in (1, 2):
            log.add({"bad": Last(math.nan), "worse": Last(-math.inf), "good": Last(1.0)})
            values = log.flush(step)
    assert math.isnan(values["bad"])
    assert [(line["bad"], line["worse"], line["good"]) for line in lines(tmp_path)] == [
        (None, None, 1.0)
    ] * 2
    assert [record.args[0] for record in caplog.records] == ["bad", "worse"]
    assert [set(metrics) for _, metrics in ranks.tracked] == [{"good", "timing_s/step"}] * 2


def test_only_the_main_rank_writes_tracks_and_shows(tmp_path):
    ranks = Ranks({"n": Sum(1.0)}, is_main=False)
    log = MetricLog(tmp_path / "run", ranks)
    log.rewind(1)
    log.add({"n": Sum(2.0)})
    assert log.flush(1)["n"] == 3.0
    assert not (tmp_path / "run").exists()
    assert ranks.tracked == []
    assert ranks.gathered == 1


def test_throughput_is_all_ranks_tokens_over_the_slowest_ranks_step(tmp_path):
    clock = Clock()
    ranks = Ranks({"rollout/sampled_tokens": Sum(30.0), "timing_s/step": Max(4.0)})
    log = MetricLog(tmp_path, ranks, clock=clock)
    clock.now += 1000  # loading models is no part of the first step
    log.rewind(1)
    clock.now += 2
    log.add({"rollout/sampled_tokens": Sum(10.0)})
    values = log.flush(1)
    assert values["timing_s/step"] == 4.0
    assert values["perf/throughput"] == (30 + 10) / 4
    ranks.others = ()
    clock.now += 5
    log.add({"rollout/sampled_tokens": Sum(10.0)})
    assert log.flush(2)["perf/throughput"] == 10 / 5


def run(output, steps, start=None):
    log = MetricLog(output, Ranks())
    if start is not None:
        log.rewind(start)
    for step in steps:
        log.add({"n": Last(float(step))})
        log.flush(step)


def test_resuming_cuts_away_the_steps_that_will_be_run_again(tmp_path):
    run(tmp_path, range(6), start=1)
    run(tmp_path, [4, 5, 6], start=4)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_start_over_an_unfinished_run_has_one_step_zero(tmp_path):
    run(tmp_path, [0, 1, 2], start=1)
    run(tmp_path, [0, 1], start=1)  # killed before the first checkpoint
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_steps_are_unique_without_a_rewind_too(tmp_path):
    run(tmp_path, [1, 2, 3])
    run(tmp_path, [3, 4, 4])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_line_cut_by_a_kill_is_dropped_on_resume(tmp_path):
    run(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/me')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    run(tmp_path, [3], start=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_foreign_line_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"line 2.*hello"):
        read_metrics(path)


def test_the_display_gets_every_step_and_is_closed(tmp_path):
    class Display:
        def __init__(self):
            self.calls = []

        def begin(self, done):
            self.calls.append(("begin", done))

        def step(self, step, values):
            self.calls.append((step, values["n"]))

        def close(self):
            self.calls.append("close")

    display = Display()
    log = MetricLog(tmp_path, Ranks(), display)
    log.rewind(4)
    log.add({"n": Sum(1.0)})
    log.flush(4)
    log.close()
    assert display.calls == [("begin", 3), (4, 1.0), "close"]
