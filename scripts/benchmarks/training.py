"""Training: how fast, in which phase the time goes, how much memory, by the numbers of metrics.jsonl."""

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import fresh_folder, run_job
from report import Report, rate, settled, shares

SAMPLES, STEPS, WARM_UP, LAST = 256, 16, 3, 1
"""Samples of a step; steps run, and left out at both ends: the last one saves the model."""
UPDATES = ("update_actor", "update_critic")


def measure(start: Path, threads: int) -> list[Report]:
    """One table for each of the two quickstart recipes."""
    return [of_recipe(name, start, threads) for name in ("grpo", "ppo")]


def train(
    recipe: str,
    start: Path,
    threads: int,
    *,
    steps: int = STEPS,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train without evaluation; the lines of metrics.jsonl, and what the process used."""
    output = fresh_folder(recipe)
    usage = run_job(
        [
            sys.executable,
            "recipes/train.py",
            f"recipes/quickstart_{recipe}.yaml",
            f"model.name={start / 'policy'}",
            f"data.name={start / 'train.jsonl'}",
            "evaluation=null",
            f"run.steps={steps}",
            f"run.seed={seed}",
            f"run.output={output}",
            *overrides,
        ],
        threads,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output)
    return {"lines": lines, "peak_mb": usage.peak_mb}


def of_recipe(recipe: str, start: Path, threads: int) -> Report:
    found = train(recipe, start, threads)
    lines = settled(found["lines"], warm_up=WARM_UP, last=LAST)
    step = statistics.fmean(line["timing_s/step"] for line in lines)
    phases = {
        name.removeprefix("timing_s/"): statistics.fmean(line[name] for line in lines)
        for name in lines[0]
        if name.startswith("timing_s/") and name != "timing_s/step"
    }
    tokens = statistics.fmean(line["rollout/tokens"] for line in lines)
    learning = [sum(line.get(f"timing_s/{name}", 0.0) for name in UPDATES) for line in lines]
    rows = [
        [phase, phases.get(phase, share * step), f"{share:.0%}"]
        for phase, share in shares(phases, total=step).items()
    ]
    return Report(
        title=f"Training, quickstart_{recipe}: a step of {SAMPLES} responses, means of {len(lines)} steps",
        columns=["phase", "seconds", "share"],
        rows=[*rows, ["step", step, "100%"]],
        notes=[
            f"{rate(SAMPLES, [step]):,.0f} responses/s, {tokens / step:,.0f} response tokens/s end to end; "
            f"{rate(tokens, learning):,.0f} response tokens/s in the updates; "
            f"peak resident memory {found['peak_mb']:,.0f} MiB."
        ],
        raw={"lines": found["lines"], "peak_mb": found["peak_mb"]},
    )
