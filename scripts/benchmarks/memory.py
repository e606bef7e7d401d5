"""Memory of log-probabilities at a large vocabulary: in chunks, against all logits at once."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import CHECKOUT, JobError
from report import Cell, Report

VOCABULARY = 151_936  # Qwen2.5
SIZES = [(1024, 256), (2048, 64), (2048, 256), (4096, 256)]
"""(tokens, hidden size) of the measured cases."""
TOO_MANY_TOKENS = 4096
"""From here the naive way would take 7 GiB and more and is left out."""
CHUNKS_MB = [256, 64]
AGREE = 1e-3
"""Relative difference that is still rounding, of sums of 2048 x 152k float32 numbers in another order."""


def measure(start: Path, threads: int) -> list[Report]:
    """One table over sizes; `start` is not needed."""
    rows: list[list[Cell]] = []
    raw: dict[str, Any] = {}
    for tokens, hidden in SIZES:
        ways = {f"{mb} MiB": job("chunked", tokens, hidden, mb, threads) for mb in CHUNKS_MB}
        naive = job("naive", tokens, hidden, 0, threads) if tokens < TOO_MANY_TOKENS else None
        if naive:
            rows.append(
                [f"{tokens} x {hidden}", "naive", naive["peak_mb"], 1.0, naive["cpu_seconds"]]
            )
        for way, found in ways.items():
            if naive:
                check_same(naive, found)
            times = naive["peak_mb"] / found["peak_mb"] if naive else None
            rows.append(
                [f"{tokens} x {hidden}", way, found["peak_mb"], times, found["cpu_seconds"]]
            )
        raw[f"{tokens}x{hidden}"] = {"naive": naive, **ways}
    return [
        Report(
            title=f"Memory of log-probs and entropies at {VOCABULARY:,} words, float32, forward and backward",
            columns=["tokens x hidden", "chunks of", "peak MiB", "naive / peak", "CPU seconds"],
            rows=rows,
            notes=[
                "Peak resident memory above that of hidden vectors, output layer and their gradients."
            ],
            raw=raw,
        )
    ]


def job(way: str, tokens: int, hidden: int, chunk_mb: int, threads: int) -> dict[str, float]:
    """What `memory_job.py` found."""
    numbers = [str(n) for n in (tokens, hidden, VOCABULARY, chunk_mb)]
    done = subprocess.run(
        [sys.executable, "scripts/benchmarks/memory_job.py", way, *numbers],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise JobError(f"{done.stderr[-2000:]}\n{way} {numbers} ended with {done.returncode}")
    return json.loads(done.stdout)


def check_same(naive: dict[str, float], found: dict[str, float]) -> None:
    """Saving memory counts only if the numbers are the same."""
    for name in ("logprob", "entropy", "gradient"):
        if not math.isclose(naive[name], found[name], rel_tol=AGREE):
            raise JobError(f"{name} differs: {found[name]} in chunks, {naive[name]} naively")
