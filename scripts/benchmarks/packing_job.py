"""Log-probs of a workload's rows, forward and backward: packed in all ways in turn, or in one way for its memory.

python scripts/benchmarks/packing_job.py RESULT.json MODEL WORKLOAD MAX_TOKENS ROUNDS|padded|varlen|trie|nothing
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packed_workloads import VOCABULARY, WORKLOADS, unshared
from packing import MODELS
from transformers import Qwen2Config, Qwen2ForCausalLM

from llmac.core.types import Trajectory
from llmac.models.packing import Kind, Packing
from llmac.models.policy import TokenPolicy

KINDS: tuple[Kind, ...] = ("padded", "varlen", "trie")
IDEAL = "unshared"


def policy_of(model: str) -> TokenPolicy:
    """A random Qwen2 of one of the sizes."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCABULARY, pad_token_id=None, **MODELS[model])
    return TokenPolicy(Qwen2ForCausalLM(config).train(), temperature=1.0, chunk_mb=256.0)


def work(policy: TokenPolicy, rows: Sequence[Trajectory], packing: Packing) -> dict[str, float]:
    """One pass over the rows; gradients are added to those there are."""
    total, computed = 0.0, 0
    begun = time.process_time()
    for _, packed in packing.packed(rows):
        logprobs, _ = policy(packed)
        logprobs.sum().backward()
        total += logprobs.sum().item()
        computed += packed.input_ids.numel()
    return {"seconds": time.process_time() - begun, "logprobs": total, "computed": computed}


def in_turn(model: str, workload: str, max_tokens: int, rounds: int) -> dict[str, Any]:
    """What the workload is, and rounds of all kinds and of unshared rows, each beginning with another of them."""
    policy, made = policy_of(model), WORKLOADS[workload]()

    def packing(kind: Kind) -> Packing:
        return Packing(kind=kind, max_tokens=max_tokens, pad_id=0).fitting(policy.model)

    cases = {kind: (made.rows, packing(kind)) for kind in KINDS}
    cases[IDEAL] = (unshared(made), packing("varlen"))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for kind in KINDS:
        work(policy, made.rows[:2], packing(kind))
    for turn in range(rounds):
        names = itertools.islice(itertools.cycle(cases), turn, turn + len(cases))
        for name in names:
            found[name].append(work(policy, *cases[name]))
    return {
        "title": made.title,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "rows": len(made.rows),
        "row_tokens": made.row_tokens,
        "distinct": made.distinct,
        "asked": made.asked,
        "rounds": found,
    }


def alone(model: str, workload: str, max_tokens: int, kind: str) -> dict[str, float]:
    """One pass of one kind; of `nothing` only model, gradients and a first pass."""
    policy, rows = policy_of(model), WORKLOADS[workload]().rows
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    chosen = Packing(
        kind="padded" if kind == "nothing" else kind, max_tokens=max_tokens, pad_id=0
    ).fitting(policy.model)
    found = work(policy, rows[:2] if kind == "nothing" else rows, chosen)
    norm = torch.nn.utils.get_total_norm(p.grad for p in policy.parameters())
    return {**found, "gradient": norm.item()}


def main(result: Path, model: str, workload: str, max_tokens: int, what: str) -> None:
    if what.isdigit():
        answer = in_turn(model, workload, max_tokens, int(what))
    else:
        answer = alone(model, workload, max_tokens, what)
    result.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
