"""Critics on two tasks: how right they are, and what that is worth to PPO at the same number of sampled tokens.

Finished runs are lines of runs/benchmark/critics/results.jsonl and are not run again.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import CHECKOUT, RUNS, JobError, quickstart_start, run_job
from kept import Line, empty, finished, is_run, run_and_keep
from pages import write_between
from report import Cell, Report

FOLDER = RUNS / "critics"
RESULTS = FOLDER / "results.jsonl"
PAGE = CHECKOUT / "docs" / "benchmarks.md"
MARKS = "<!-- critics: made by scripts/benchmark critics -->", "<!-- critics: end -->"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt, how long, and when critics are judged."""

    recipe: str
    """recipes/<recipe>_ppo.yaml and recipes/<recipe>_grpo.yaml"""
    steps: int
    moments: tuple[int, ...]
    """Steps whose critic is judged: while the policy still fails now and then, and at the end."""
    states: int
    rollouts: int
    """Continuations of each state."""


TASKS = {
    "quickstart": Task(recipe="quickstart", steps=100, moments=(20, 100), states=200, rollouts=32),
    "stages": Task(recipe="stages", steps=80, moments=(80,), states=100, rollouts=16),
}
ORACLE = "critic={name: 'scripts/benchmarks/oracle.py:StepOracle'}"
HEAD = "lr: 1.0e-3, betas: [0.9, 0.98]"
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "grpo": ("grpo", ()),
    "grpo, lr x 2": ("grpo", ("actor.lr=1.0e-3",)),
    "ppo, as the recipe": ("ppo", ()),
    "ppo, surprise, lam .95": ("ppo", ("algorithm.lam=0.95", "algorithm.critic_lam=1.0")),
    "ppo, oracle, lam 0": ("ppo", (ORACLE, "algorithm.lam=0.0")),
    "ppo, value_head": ("ppo", (f"critic={{name: value_head, {HEAD}, value_clip: null}}",)),
    "ppo, bernoulli": ("ppo", (f"critic={{name: bernoulli, {HEAD}}}",)),
    "ppo, hl_gauss": ("ppo", (f"critic={{name: hl_gauss, {HEAD}}}",)),
    "ppo, running_mean": ("ppo", ("critic={name: running_mean}",)),
}
"""Name: recipe, overrides. In the order of the table."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this part, and of others over seeds."""
    group = parser.add_argument_group("critics, credit; guided reads --seeds and --docs")
    group.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    group.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    group.add_argument("--only", nargs="+", metavar="SETTING", help="rows of the table")
    group.add_argument("--docs", action="store_true", help="also write docs/benchmarks.md")


def chosen(only: Sequence[str] | None, settings: Mapping[str, object]) -> list[str]:
    """The settings asked for; None: all.

    Raises:
        JobError: one that there is not.
    """
    unknown = sorted(set(only or ()) - set(settings))
    if unknown:
        raise JobError(f"--only: there is no {unknown[0]!r}; settings: {', '.join(settings)}")
    return [name for name in settings if only is None or name in only]


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
        write_between(PAGE, MARKS, reports)
    return reports


def train(name: str, setting: str, seed: int, threads: int) -> None:
    """One run in a process of its own; its result becomes a line, its folder goes."""
    task, (method, overrides) = TASKS[name], SETTINGS[setting]
    start = start_of(name)
    folder = empty(FOLDER / f"{name}-{list(SETTINGS).index(setting)}-{seed}")
    job = {
        "recipe": f"recipes/{task.recipe}_{method}.yaml",
        "overrides": [
            f"model.name={start / 'policy'}",
            f"data.name={start / 'train.jsonl'}",
            f"evaluation.data.name={start / 'held_out.jsonl'}",
            f"run.output={folder / 'run'}",
            f"run.seed={seed}",
            f"run.steps={task.steps}",
            f"run.save_every={min(task.moments)}",
            "run.keep_last=100",
            *overrides,
        ],
        "moments": task.moments,
        "states": task.states,
        "rollouts": task.rollouts,
    }
    run = {"task": name, "setting": setting, "seed": seed}
    run_and_keep(RESULTS, folder, "critics_job.py", job, run=run, threads=threads)


def start_of(name: str) -> Path:
    """Policy and prompts of a task, seed 0, made once."""
    if name == "quickstart":
        return quickstart_start()
    start, made = RUNS / f"{name}-start", RUNS / f"{name}-start.made"
    if not made.exists():
        run_job([sys.executable, f"recipes/{name}.py", start, "--seed", "0"], threads=1)
        made.touch()
    return start


def table(name: str, lines: Sequence[Line]) -> Report:
    """Means over seeds ± standard errors; of critics over the states of all seeds, ± jackknife over seeds."""
    task = TASKS[name]
    rows: list[list[Cell]] = []
    raw: dict[str, Any] = {}
    for setting in SETTINGS:
        runs = [x for x in lines if x["task"] == name and x["setting"] == setting]
        if not runs:
            continue
        raw[setting] = [{key: run[key] for key in ("seed", "held_out", "tokens")} for run in runs]
        rows.append(
            [
                setting,
                len(runs),
                *(spread([run["held_out"][str(step)] for run in runs]) for step in task.moments),
                *(
                    cell
                    for step in task.moments
                    for cell in (judged(runs, step, explained), judged(runs, step, error))
                ),
                statistics.fmean(run["tokens"] for run in runs) / 1e6,
                statistics.fmean(run["cpu_seconds"] for run in runs),
            ]
        )
    dates = sorted({str(x["date"]) for x in lines if x["task"] == name})
    return Report(
        title=f"Task {name}, {task.steps} steps",
        columns=[
            "setting",
            "seeds",
            *(f"accuracy, step {step}" for step in task.moments),
            *(f"{what}, step {step}" for step in task.moments for what in ("EV", "RMSE")),
            "tokens, M",
            "CPU s",
        ],
        rows=rows,
        notes=[
            f"Measured {dates[0]} to {dates[-1]}. Accuracy: 256 held-out prompts. EV, RMSE: values of {task.states} "
            f"states a seed at five depths against the mean of {task.rollouts} continuations each."
        ],
        raw=raw,
    )


def spread(numbers: Sequence[float]) -> str:
    """Mean ± standard error of the mean; of one number only itself.

    >>> spread([0.5, 0.7]), spread([0.5])
    ('.600 ± .100', '.500')
    """
    mean = short(statistics.fmean(numbers))
    if len(numbers) < 2:
        return mean
    return f"{mean} ± {short(statistics.stdev(numbers) / len(numbers) ** 0.5)}"


def short(number: float) -> str:
    """Three decimals without the zero before them."""
    return f"{number:.3f}".replace("0.", ".", 1)


def judged(runs: Sequence[Line], step: int, measure: Any) -> Cell:
    """The measure over the states of all seeds ± its jackknife standard error over seeds; None without a critic."""
    seeds = [m for run in runs for m in run["moments"] if m["step"] == step]
    if not seeds:
        return None
    whole = short(measure(seeds))
    if len(seeds) < 2:
        return whole
    without = [measure([m for m in seeds if m is not left]) for left in seeds]
    scale = (len(seeds) - 1) / len(seeds)
    error = (scale * sum((x - statistics.fmean(without)) ** 2 for x in without)) ** 0.5
    return f"{whole} ± {short(error)}"


def explained(seeds: Sequence[Line]) -> float:
    """1 - Var(truth - value) / Var(truth) over the states of these seeds."""
    truth = [t for m in seeds for t in m["truth"]]
    wrong = [t - v for m in seeds for t, v in zip(m["truth"], m["values"], strict=True)]
    varies = statistics.pvariance(truth)
    return 1 - statistics.pvariance(wrong) / varies if varies else float("nan")


def error(seeds: Sequence[Line]) -> float:
    """Root mean squared error against Monte Carlo, its noise included."""
    wrong = [t - v for m in seeds for t, v in zip(m["truth"], m["values"], strict=True)]
    return statistics.fmean(x * x for x in wrong) ** 0.5
