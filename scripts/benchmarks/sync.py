"""The way of the weights from the trainer to an engine: seconds, against a plain copy of the same bytes."""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from jobs import CHECKOUT, fresh_folder, run_job
from report import Cell, Report, ratio

SIZES = ("3M", "100M", "500M")
DESTINATIONS = ("null", "vllm")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is measured."""

    sizes: Sequence[str]
    destinations: Sequence[str]
    processes: Sequence[int]
    rounds: int
    bucket_mb: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this part alone."""
    group = parser.add_argument_group("sync")
    group.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    group.add_argument(
        "--destinations",
        nargs="+",
        choices=DESTINATIONS,
        default=list(DESTINATIONS),
        help="null: copied once into tensors that are there; vllm: into an engine in the process",
    )
    group.add_argument(
        "--processes", nargs="+", type=int, default=[1, 2], help="1: whole; more: cut by ZeRO-3"
    )
    group.add_argument("--rounds", type=int, default=7)
    group.add_argument("--bucket-mb", type=int, default=512)


def choice(arguments: argparse.Namespace) -> Choice:
    """From the command line."""
    return Choice(
        sizes=arguments.sizes,
        destinations=arguments.destinations,
        processes=arguments.processes,
        rounds=arguments.rounds,
        bucket_mb=arguments.bucket_mb,
    )


def measure(choice: Choice, threads: int) -> list[Report]:
    """One table over destinations, processes and sizes."""
    folder = fresh_folder("sync")
    rows: list[list[Cell]] = []
    raw: dict[str, Any] = {}
    for where, processes, size in product(choice.destinations, choice.processes, choice.sizes):
        if absent := needs(where, processes):
            sys.stderr.write(f"{absent} is not installed: no {where} with {processes} processes\n")
            continue
        found = job(size, where, processes, choice, folder / "result.json", threads)
        rows.append([where, str(processes), size, *numbers(found)])
        raw[f"{where} {processes} {size}"] = found
    shutil.rmtree(folder)
    return [
        Report(
            title=f"Weights to an engine, float32, buckets of {choice.bucket_mb} MiB, medians of {choice.rounds}",
            columns=[
                "to",
                "processes",
                "parameters",
                "seconds",
                "slowest / fastest",
                "GB/s",
                "/ plain copy",
                "MiB above shards",
            ],
            rows=rows,
            notes=[
                "Plain copy: every process copies as many bytes, tensor by tensor. Memory: the first round's peak of a "
                "process above its shards and the destination, pages shared with others included."
            ],
            raw=raw,
        )
    ]


def needs(where: str, processes: int) -> str | None:
    """A package that is missing; None: none is."""
    wanted = ["vllm"] * (where == "vllm") + ["deepspeed"] * (processes > 1)
    return next((name for name in wanted if find_spec(name) is None), None)


def numbers(found: dict[str, Any]) -> list[Cell]:
    streamed, copied = found["stream_seconds"], found["copy_seconds"]
    middle = statistics.median(streamed)
    return [
        middle,
        max(streamed) / min(streamed),
        found["bytes"] / middle / 1e9,
        ratio(streamed, copied),
        found["above_shards_bytes"] / 2**20,
    ]


def job(
    size: str, where: str, processes: int, choice: Choice, result: Path, threads: int
) -> dict[str, Any]:
    """What `sync_job.py` found."""
    program = CHECKOUT / "scripts" / "benchmarks" / "sync_job.py"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = [size, where, str(choice.bucket_mb), str(choice.rounds), result]
    run_job([*launcher, program, *options], threads)
    return json.loads(result.read_text())
