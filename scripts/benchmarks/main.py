"""Command line of scripts/benchmark: runs the parts asked for and prints what they found."""

import argparse
import json
import sys
import time
from pathlib import Path

import against_trl
import credit
import critics
import genac
import guided
import memory
import packing
import rollout
import sync
import training
from jobs import JobError, quickstart_start
from report import Report, as_json, as_text
from surroundings import describe

PARTS = {"rollout": rollout, "train": training, "memory": memory, "trl": against_trl}
COMPARISONS = {
    "critics": critics,
    "credit": credit,
    "packing": packing,
    "genac": genac,
    "guided": guided,
}
"""Not among all: half an hour to many hours each."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description="Measure llmac on this machine."
    )
    parser.add_argument(
        "part", nargs="?", default="all", choices=[*PARTS, "sync", *COMPARISONS, "all"]
    )
    parser.add_argument("--json", type=Path, help="also write every number there")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default 1)")
    parser.add_argument(
        "--start", type=Path, help="made by recipes/quickstart.py; default: runs/benchmark/start"
    )
    parser.add_argument("--relative-to", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    sync.add_options(parser)
    critics.add_options(parser)
    packing.add_options(parser)
    arguments = parser.parse_args()
    chosen = [*PARTS, "sync"] if arguments.part == "all" else [arguments.part]

    sys.stdout.write(f"{describe(arguments.threads)}\n")
    reports: list[Report] = []
    failed = False
    for name in chosen:
        begun = time.monotonic()
        try:
            if name == "sync":
                found = sync.measure(sync.choice(arguments), arguments.threads)
            elif name in COMPARISONS:
                found = COMPARISONS[name].measure(arguments, arguments.threads)
            else:
                start = arguments.relative_to / arguments.start if arguments.start else None
                found = PARTS[name].measure(start or quickstart_start(), arguments.threads)
        except JobError as error:
            sys.stderr.write(f"scripts/benchmark {name}: {error}\n")
            failed = True
            continue
        reports += found
        sys.stdout.write("".join(f"\n{as_text(report)}" for report in found))
        sys.stdout.write(f"({name}: {time.monotonic() - begun:.0f} s)\n")
        sys.stdout.flush()
    if arguments.json:
        text = json.dumps(as_json(describe(arguments.threads), reports), indent=1)
        (arguments.relative_to / arguments.json).write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
