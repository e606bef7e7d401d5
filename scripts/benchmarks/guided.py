"""Guided decoding on the quickstart task: how often the chosen answer is right, at how many sampled tokens.

Of each seed: a policy and prompts, a critic pre-trained on rollouts of that policy, a PPO run of it whose result is
handed on, and a larger policy that has copied the same student. All are made once, in runs/benchmark/guided;
results are lines of results.jsonl there, and are not measured again.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from critics import spread
from jobs import CHECKOUT, RUNS, run_job
from kept import Line, empty, finished, is_run, run_and_keep
from pages import check_marks, write_between
from report import Cell, Report

FOLDER = RUNS / "guided"
RESULTS = FOLDER / "results.jsonl"
PAGE = CHECKOUT / "docs" / "benchmarks.md"
MARKS = "<!-- guided: made by scripts/benchmark guided -->", "<!-- guided: end -->"
TASK, SETTING = "quickstart", "all"
RECIPE = CHECKOUT / "recipes" / "quickstart_ppo.yaml"
CRITIC = "critic={name: bernoulli, lr: 1.0e-3, betas: [0.9, 0.98]}"
RESPONSES, EPOCHS = 8192, 3
"""What the critic learns from, and at most how often."""
LARGE_SEEDS = 1
"""Seeds for which a larger policy is made to be shifted: it takes longer than everything else."""


def measure(arguments: argparse.Namespace, threads: int) -> list[Report]:
    """One table, of all seeds that there are."""
    if arguments.docs:
        check_marks(PAGE, MARKS)
    for seed in range(arguments.seeds):
        if any(is_run(line, TASK, SETTING, seed) for line in finished(RESULTS)):
            continue
        job = made(seed, threads)
        folder = empty(FOLDER / f"job-{seed}")
        run = {"task": TASK, "setting": SETTING, "seed": seed}
        run_and_keep(RESULTS, folder, "guided_job.py", job, run=run, threads=threads)
    reports = [table(finished(RESULTS))]
    if arguments.docs:
        write_between(PAGE, MARKS, reports)
    return reports


def made(seed: int, threads: int) -> dict[str, str | int]:
    """What a seed is measured with: about ten minutes of one core, once."""
    home = FOLDER / str(seed)
    home.mkdir(parents=True, exist_ok=True)
    start, large, critic, run = (home / name for name in ("start", "large", "critic", "run"))
    recipe = [
        RECIPE,
        f"model.name={start / 'policy'}",
        f"data.name={start / 'train.jsonl'}",
        f"evaluation.data.name={start / 'held_out.jsonl'}",
        f"run.output={run}",
        f"run.seed={seed}",
    ]
    llmac, rollouts = [sys.executable, "-m", "llmac.cli"], home / "rollouts.parquet"
    steps: list[tuple[Path, list[str | Path]]] = [
        (start, [sys.executable, "recipes/quickstart.py", start, "--seed", str(seed)]),
        (
            rollouts,
            [*llmac, "rollouts", *recipe, "--responses", str(RESPONSES), "--output", rollouts],
        ),
        (
            critic,
            [
                *llmac,
                "value-pretrain",
                RECIPE,
                rollouts,
                *recipe[1:],
                CRITIC,
                "--epochs",
                str(EPOCHS),
                "--output",
                critic,
            ],
        ),
        (run, [sys.executable, "recipes/train.py", *recipe]),
    ]
    if seed < LARGE_SEEDS:
        copy = [sys.executable, "scripts/benchmarks/guided_large.py", large, str(seed)]
        steps.append((large, copy))
    for result, command in steps:
        mark = home / f"{result.name}.made"
        if not mark.exists():
            sys.stderr.write(f"making {result.relative_to(CHECKOUT)}\n")
            run_job(command, threads)
            mark.touch()
    return {
        "policy": str(start / "policy"),
        "prompts": str(start / "held_out.jsonl"),
        "critic": str(critic / "critic"),
        "large": str(large) if seed < LARGE_SEEDS else "",
        "tuned": str(run / "final"),
        "seed": seed,
    }


def table(lines: Sequence[Line]) -> Report:
    """Means over seeds ± standard errors; the order is that of the job."""
    rows: list[list[Cell]] = []
    found = [one for line in lines for one in line["settings"]]
    for method, setting in dict.fromkeys((one["method"], one["setting"]) for one in found):
        same = [one for one in found if (one["method"], one["setting"]) == (method, setting)]
        rows.append(
            [
                method,
                setting,
                len(same),
                spread([one["accuracy"] for one in same]),
                *(
                    statistics.fmean(one[key] for one in same)
                    for key in ("tokens", "states", "cpu_ms")
                ),
            ]
        )
    dates = sorted({str(line["date"]) for line in lines})
    return Report(
        title="Guided decoding, quickstart",
        columns=["method", "setting", "seeds", "accuracy", "tokens", "states valued", "CPU ms"],
        rows=rows,
        notes=[
            f"Measured {dates[0]} to {dates[-1]}. Accuracy: 256 held-out prompts, ± standard error over seeds of "
            "policy, critic and sampling. Tokens (those of discarded candidates too), states and CPU time: per prompt."
        ],
        raw={"lines": list(lines)},
    )
