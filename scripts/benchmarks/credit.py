"""Ways to assign credit on two tasks: held-out accuracy against sampled tokens, all of them, and against seconds.

Finished runs are lines of runs/benchmark/credit/results.jsonl and are not run again.
"""

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from credit_picture import draw
from critics import chosen, short, spread, start_of
from jobs import CHECKOUT, RUNS
from kept import Line, empty, finished, is_run, run_and_keep
from pages import write_between
from report import Cell, Report

FOLDER = RUNS / "credit"
RESULTS = FOLDER / "results.jsonl"
PAGE = CHECKOUT / "docs" / "benchmarks.md"
PICTURE = CHECKOUT / "docs" / "credit_curves.png"
MARKS = "<!-- credit: made by scripts/benchmark credit -->", "<!-- credit: end -->"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt, and for how many steps of about equally many sampled tokens."""

    steps: int
    every: int
    """Steps from one evaluation to the next."""
    lr: float
    """Of all methods."""


TASKS = {
    "quickstart": Task(steps=40, every=4, lr=5e-4),
    "stages": Task(steps=40, every=4, lr=1e-4),
}
SETTINGS = {
    "GRPO": "grpo",
    "PPO": "ppo",
    "VinePPO": "vineppo",
    "SPO-chain": "spo_chain",
    "SPO-tree": "spo_tree",
    "TEMPO": "tempo",
}
"""Name: recipes/<task>_<this>.yaml, about as many tokens a step as the others. In the order of the table."""
REFERENCE = "GRPO"
"""Whose final accuracy is the goal."""
WATCHED = ["reward/mean", "rollout/tokens", "rollout/segments", "critic/branches"]
"""Metrics of each step that are kept with a result, to explain it."""


def measure(arguments: argparse.Namespace, threads: int) -> list[Report]:
    """One table a task, of all results there are. Seed by seed, so that an early end leaves comparable rows."""
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for setting in chosen(arguments.only, SETTINGS):
                if not any(is_run(line, task, setting, seed) for line in finished(RESULTS)):
                    train(task, setting, seed, threads)
    found = finished(RESULTS)
    reports = [table(task, found) for task in TASKS if any(x["task"] == task for x in found)]
    if arguments.docs:
        draw({name: runs_of(name, found) for name in TASKS}, PICTURE)
        write_between(PAGE, MARKS, reports)
    return reports


def train(name: str, setting: str, seed: int, threads: int) -> None:
    """One run in a process of its own; its result becomes a line, its folder goes."""
    task, start = TASKS[name], start_of(name)
    folder = empty(FOLDER / f"{name}-{SETTINGS[setting]}-{seed}")
    job = {
        "recipe": f"recipes/{name}_{SETTINGS[setting]}.yaml",
        "overrides": [
            f"model.name={start / 'policy'}",
            f"data.name={start / 'train.jsonl'}",
            f"evaluation.data.name={start / 'held_out.jsonl'}",
            f"evaluation.every={task.every}",
            f"actor.lr={task.lr}",
            f"run.output={folder / 'run'}",
            f"run.seed={seed}",
            f"run.steps={task.steps}",
            f"run.save_every={task.steps}",
        ],
        "watch": WATCHED,
    }
    run = {"task": name, "setting": setting, "seed": seed}
    run_and_keep(RESULTS, folder, "credit_job.py", job, run=run, threads=threads)


def runs_of(name: str, lines: Sequence[Line]) -> dict[str, list[list[dict[str, float]]]]:
    """The curves of a task, by setting, those that were run."""
    curves = {
        setting: [x["curve"] for x in lines if x["task"] == name and x["setting"] == setting]
        for setting in SETTINGS
    }
    return {setting: found for setting, found in curves.items() if found}


def table(name: str, lines: Sequence[Line]) -> Report:
    """Final accuracy, cost, and tokens until the reference's final accuracy; means over seeds ± standard errors."""
    runs = runs_of(name, lines)
    goal = None
    if REFERENCE in runs:
        goal = statistics.fmean(curve[-1]["accuracy"] for curve in runs[REFERENCE])
    rows: list[list[Cell]] = []
    for setting, curves in runs.items():
        rows.append(
            [
                setting,
                len(curves),
                spread([curve[-1]["accuracy"] for curve in curves]),
                spread([area(curve) for curve in curves]),
                *(("-", "-") if goal is None else until(curves, goal)),
                statistics.fmean(curve[-1]["tokens"] for curve in curves) / 1e6,
                statistics.fmean(curve[-1]["cpu_seconds"] for curve in curves),
                statistics.fmean(curve[-1]["seconds"] for curve in curves),
            ]
        )
    dates = sorted({str(x["date"]) for x in lines if x["task"] == name})
    return Report(
        title=f"Task {name}, {TASKS[name].steps} steps",
        columns=[
            "method",
            "seeds",
            "final accuracy",
            "mean accuracy",
            f"tokens to {REFERENCE}'s {'-' if goal is None else short(goal)}, M",
            "reached by",
            "tokens, M",
            "CPU s",
            "wall s",
        ],
        rows=rows,
        notes=[f"Measured {dates[0]} to {dates[-1]}."],
        raw={setting: [list(curve) for curve in curves] for setting, curves in runs.items()},
    )


def area(curve: Sequence[Mapping[str, float]]) -> float:
    """Mean accuracy over the tokens of the run: how early it learns.

    >>> area([{"tokens": 0, "accuracy": 0.0}, {"tokens": 2, "accuracy": 1.0}, {"tokens": 3, "accuracy": 1.0}])
    0.6666666666666666
    """
    pieces = (
        (b["tokens"] - a["tokens"]) * (a["accuracy"] + b["accuracy"]) / 2
        for a, b in itertools.pairwise(curve)
    )
    return sum(pieces) / (curve[-1]["tokens"] - curve[0]["tokens"])


def until(curves: Sequence[Sequence[Mapping[str, float]]], goal: float) -> tuple[Cell, Cell]:
    """Tokens, millions, at which the goal was first reached, and by how many; who never did counts with all it used.

    With such a run in it the mean is a lower bound, and says so.
    """
    reached = [first_at(curve, goal) for curve in curves]
    used = [
        (curve[-1]["tokens"] if at is None else at) / 1e6
        for curve, at in zip(curves, reached, strict=True)
    ]
    by = len(curves) - reached.count(None)
    return ("" if by == len(curves) else "> ") + spread(used), f"{by} of {len(curves)}"


def first_at(curve: Sequence[Mapping[str, float]], goal: float) -> float | None:
    """Tokens at which the straight line between evaluations first reaches the goal; None: never.

    >>> first_at([{"tokens": 0, "accuracy": 0.2}, {"tokens": 10, "accuracy": 0.6}], 0.5)
    7.5
    """
    if curve[0]["accuracy"] >= goal:
        return curve[0]["tokens"]
    for a, b in itertools.pairwise(curve):
        if b["accuracy"] >= goal:
            way = (goal - a["accuracy"]) / (b["accuracy"] - a["accuracy"])
            return a["tokens"] + way * (b["tokens"] - a["tokens"])
    return None
