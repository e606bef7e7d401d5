"""Measured work runs in processes of its own: nothing that one leaves behind is counted for the next."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
RUNS = CHECKOUT / "runs" / "benchmark"


class JobError(Exception):
    """A measured process failed; the message has the end of what it said."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a finished process has used."""

    cpu_seconds: float
    peak_mb: float
    """Largest resident memory of the process or one of its own children, MiB."""


def run_job(command: list[str | Path], threads: int) -> Usage:
    """Run with `threads` threads, in the checkout; its output is shown only if it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=CHECKOUT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            tail = "".join(output.readlines()[-20:])
            raise JobError(
                f"{tail}\n`{' '.join(map(str, command[:3]))} ...` ended with {process.returncode}"
            )
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Usage(cpu_seconds=usage.ru_utime + usage.ru_stime, peak_mb=usage.ru_maxrss / unit)


def quickstart_start() -> Path:
    """The quickstart's policy and prompts (seed 0), made once: about a minute."""
    start = RUNS / "start"
    made = RUNS / "start.made"
    if not made.exists():
        sys.stderr.write(f"making the quickstart's policy in {start.relative_to(CHECKOUT)}\n")
        cores = min(4, os.cpu_count() or 1)
        run_job([sys.executable, "recipes/quickstart.py", start, "--seed", "0"], threads=cores)
        made.touch()
    return start


def fresh_folder(name: str) -> Path:
    """An empty folder below runs/benchmark."""
    RUNS.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=RUNS))
