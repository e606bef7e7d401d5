"""Rows that share prefixes, packed in three ways: padded, side by side, as a trie: what sharing saves.

What nothing but the distinct tokens would cost is measured, not computed: *ideal* is the time of unshared rows, side by
side, of the same lengths, that have as many tokens in all as the workload has distinct ones and ask for as many
log-probabilities (`packed_workloads.unshared`). A trie's tokens look at more keys than those: where attention
dominates, and where rows are short, the trie cannot reach it.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import training
from jobs import CHECKOUT, JobError, fresh_folder, quickstart_start, run_job
from pages import write_between
from report import Cell, Report, ratio, settled

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "medium": {
        "hidden_size": 384,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}
"""Sizes of random Qwen2 policies."""
WORKLOADS = ("groups", "tree", "chain")
KINDS = ("padded", "varlen", "trie")
SEEN = ("old_log_prob", "update_actor")
"""Phases of a step that read rows with the policy."""
STEPS, WARM_UP = 8, 2
"""Of the recipe, and those not counted."""
AGREE = 1e-3
"""Relative difference that is rounding."""
PAGE = CHECKOUT / "docs" / "benchmarks.md"
MARKS = "<!-- packing: made by scripts/benchmark packing -->", "<!-- packing: end -->"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this part alone; `--docs` is that of all."""
    group = parser.add_argument_group("packing")
    group.add_argument("--models", nargs="+", choices=list(MODELS), default=["small", "medium"])
    group.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    group.add_argument("--packing-rounds", type=int, default=3, help="of each kind, in turn")
    group.add_argument(
        "--packing-tokens", type=int, default=8192, help="max_tokens_per_microbatch (default 8192)"
    )


def measure(arguments: argparse.Namespace, threads: int) -> list[Report]:
    """One table for each model, and one for steps of a recipe."""
    reports = [of_model(model, arguments, threads) for model in arguments.models]
    reports.append(of_recipe("grpo", arguments.packing_rounds, threads))
    if arguments.docs:
        write_between(PAGE, MARKS, reports)
    return reports


def of_model(model: str, arguments: argparse.Namespace, threads: int) -> Report:
    rows: list[list[Cell]] = []
    raw: dict[str, Any] = {}
    for workload in arguments.workloads:
        asked = [model, workload, str(arguments.packing_tokens)]
        timed, _ = job([*asked, str(arguments.packing_rounds)], threads)
        peaks = memory(asked, threads)
        raw[workload] = {**timed, "peak_mb": peaks}
        rows += table(timed, peaks)
    parameters = next(iter(raw.values()))["parameters"]
    return Report(
        title=f"Packing, Qwen2 of {parameters:,} random parameters, {arguments.packing_tokens:,} tokens a micro-batch",
        columns=[
            "workload",
            "packing",
            "tokens computed",
            "/ distinct",
            "CPU seconds",
            "/ trie",
            "/ ideal",
            "peak MiB",
        ],
        rows=rows,
        notes=[
            f"Forward and backward, packing included; rounds in turn: {arguments.packing_rounds}, medians, ratios "
            "within rounds. Ideal: unshared rows of the same lengths with as many tokens as there are distinct ones. "
            "Peak: resident memory above that of model and gradients, a process each. All ways give equal "
            "log-probabilities and gradients."
        ],
        raw=raw,
    )


def table(timed: Mapping[str, Any], peaks: Mapping[str, float]) -> list[list[Cell]]:
    """A row for each kind, and one for the ideal."""
    rounds = {name: [turn["seconds"] for turn in turns] for name, turns in timed["rounds"].items()}
    computed = {name: turns[0]["computed"] for name, turns in timed["rounds"].items()}
    label = f"{timed['title']}: {timed['rows']} rows"
    return [
        [
            label if name == KINDS[0] else "",
            "ideal" if name == "unshared" else name,
            computed[name],
            computed[name] / timed["distinct"],
            statistics.median(seconds),
            ratio(seconds, rounds["trie"]),
            ratio(seconds, rounds["unshared"]),
            peaks.get(name),
        ]
        for name, seconds in rounds.items()
    ]


def memory(asked: Sequence[str], threads: int) -> dict[str, float]:
    """Peak of each kind above that of a process that does nothing, MiB."""
    _, nothing = job([*asked, "nothing"], threads)
    found = {kind: job([*asked, kind], threads) for kind in KINDS}
    check_same({kind: answer for kind, (answer, _) in found.items()})
    return {kind: peak - nothing for kind, (_, peak) in found.items()}


def check_same(answers: Mapping[str, Mapping[str, float]]) -> None:
    """Saving counts only if the numbers are the same.

    Raises:
        JobError: two kinds differ in log-probabilities or gradients.
    """
    for name in ("logprobs", "gradient"):
        expected = answers["padded"][name]
        for kind, answer in answers.items():
            if not math.isclose(answer[name], expected, rel_tol=AGREE):
                raise JobError(f"{name} differs: {answer[name]} as {kind}, {expected} padded")


def job(options: Sequence[str], threads: int) -> tuple[dict[str, Any], float]:
    """What `packing_job.py` found, and its peak memory, MiB."""
    folder = fresh_folder("packing")
    result = folder / "result.json"
    usage = run_job(
        [sys.executable, "scripts/benchmarks/packing_job.py", result, *options], threads
    )
    found = json.loads(result.read_text())
    shutil.rmtree(folder)
    return found, usage.peak_mb


def of_recipe(recipe: str, rounds: int, threads: int) -> Report:
    """Steps of the quickstart with each kind, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            found = training.train(
                recipe,
                quickstart_start(),
                threads,
                steps=STEPS,
                overrides=[f"actor.packing={kind}"],
            )
            runs[kind].append(found)
    seconds = {
        kind: {phase: [median_of(run, phase) for run in found] for phase in SEEN}
        for kind, found in runs.items()
    }
    sums = {
        kind: [a + b for a, b in zip(*phases.values(), strict=True)]
        for kind, phases in seconds.items()
    }
    return Report(
        title=f"Packing, quickstart_{recipe}: seconds of a step",
        columns=["packing", *SEEN, "both", "/ trie"],
        rows=[
            [
                kind,
                *(statistics.median(seconds[kind][phase]) for phase in SEEN),
                statistics.median(sums[kind]),
                ratio(sums[kind], sums["trie"]),
            ]
            for kind in KINDS
        ],
        notes=[
            f"Medians of {rounds} runs in turn, each the median of {STEPS - WARM_UP} steps; wall time."
        ],
        raw={kind: [run["lines"] for run in found] for kind, found in runs.items()},
    )


def median_of(run: Mapping[str, Any], phase: str) -> float:
    lines = settled([line[f"timing_s/{phase}"] for line in run["lines"]], warm_up=WARM_UP)
    return statistics.median(lines)
