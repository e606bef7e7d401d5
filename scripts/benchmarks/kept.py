"""Runs of a comparison: each in a process of its own, kept as a line of a file, and not run again."""

import json
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs import run_job

Line = Mapping[str, Any]


def finished(results: Path) -> list[dict[str, Any]]:
    """Finished runs, in the order in which they ended."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def is_run(line: Line, task: str, setting: str, seed: int) -> bool:
    return (line["task"], line["setting"], line["seed"]) == (task, setting, seed)


def empty(folder: Path) -> Path:
    """The folder, without what an interrupted run has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_and_keep(
    results: Path, folder: Path, script: str, job: Line, *, run: Line, threads: int
) -> None:
    """Give `job` to a script of this folder; `run` (task, setting, seed) and its answer become a line.

    The folder goes when that is written.
    """
    asked, answer = folder / "job.json", folder / "result.json"
    asked.write_text(json.dumps(job))
    run_job([sys.executable, f"scripts/benchmarks/{script}", asked, answer], threads)
    line = {**run, "date": datetime.now(UTC).date().isoformat(), **json.loads(answer.read_text())}
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(folder)
