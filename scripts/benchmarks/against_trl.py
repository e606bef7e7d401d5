"""The quickstart's GRPO job, end to end, on llmac and on TRL's GRPOTrainer, in turn."""

import itertools
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from jobs import CHECKOUT, JobError, fresh_folder, run_job
from report import Cell, Report, rate, ratio, settled
from trl_venv import REQUIREMENTS, trl_python

ROUNDS = 5
SAMPLES, STEPS, WARM_UP = 256, 16, 3
"""Responses of a step; steps timed, the first ones not counted."""


def measure(start: Path, threads: int) -> list[Report]:
    """Processes alternate: llmac, TRL, llmac, TRL, ..."""
    pythons = {"llmac": Path(sys.executable), "trl": trl_python()}
    jobs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for seed in range(ROUNDS):
        for name, python in pythons.items():
            jobs[name].append(job(name, python, start.resolve(), threads, seed))
        ours, theirs = (jobs[name][-1]["wall"] for name in pythons)
        sys.stderr.write(
            f"round {seed + 1}/{ROUNDS}: {ours:.0f} and {theirs:.0f} samples a second\n"
        )
    wall, cpu = (
        ratio([j[clock] for j in jobs["llmac"]], [j[clock] for j in jobs["trl"]])
        for clock in ("wall", "cpu")
    )
    return [
        Report(
            title=f"GRPO, quickstart's policy and batch, against {REQUIREMENTS[0]}: medians of {ROUNDS} rounds",
            columns=["trainer", "samples/s", "samples/CPU s", "peak MiB"],
            rows=[
                *(
                    [name, *(middle(jobs[name], c) for c in ("wall", "cpu", "peak_mb"))]
                    for name in jobs
                ),
                ["llmac / trl", wall, cpu, None],
            ],
            notes=[f"reward by step, {name}: {curve(found)}" for name, found in jobs.items()],
            raw=jobs,
        )
    ]


def job(name: str, python: Path, start: Path, threads: int, seed: int) -> dict[str, Any]:
    """Samples per wall second and per CPU second, peak memory and rewards of one process."""
    folder = fresh_folder(name)
    result = folder / "result.json"
    program = CHECKOUT / "scripts" / "benchmarks" / f"{name}_job.py"
    # From one call of the reward to the next is a step, so the steps timed are one fewer than those run.
    command = [python, program, start, str(STEPS + 1), str(seed), folder / "run", result]
    usage = run_job(command, threads)
    calls = json.loads(result.read_text())
    shutil.rmtree(folder)
    if [call["responses"] for call in calls] != [SAMPLES] * (STEPS + 1):
        raise JobError(f"{name} has not asked for {SAMPLES} rewards at once in {STEPS + 1} steps")
    return {
        "wall": rate(SAMPLES, settled(gaps(calls, "wall"), warm_up=WARM_UP)),
        "cpu": rate(SAMPLES, settled(gaps(calls, "cpu"), warm_up=WARM_UP)),
        "peak_mb": usage.peak_mb,
        "rewards": [call["reward"] for call in calls],
    }


def gaps(calls: list[dict[str, float]], clock: str) -> list[float]:
    """Seconds from each call to the next."""
    return [b[clock] - a[clock] for a, b in itertools.pairwise(calls)]


def middle(jobs: list[dict[str, Any]], what: str) -> Cell:
    return statistics.median(job[what] for job in jobs)


def curve(jobs: list[dict[str, Any]]) -> str:
    """Mean over rounds of each step's mean reward: both learn, and the same thing."""
    by_step = zip(*(job["rewards"] for job in jobs), strict=True)
    return " ".join(f"{statistics.fmean(values):.2f}" for values in by_step)
