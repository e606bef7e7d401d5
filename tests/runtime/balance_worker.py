"""One step of GRPO on two ranks from uneven rows: as they were sampled, and balanced. Run by test_balance.py.

python balance_worker.py OUTPUT
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from sharding_worker import over_ranks, trajectories
from transformers import AutoModelForCausalLM, Qwen2Config

from llmac.actor import Actor
from llmac.algorithms.grpo import GRPO
from llmac.balance import balanced
from llmac.core.balance import imbalance
from llmac.core.collate import collate
from llmac.core.prefixes import distinct_tokens
from llmac.models.packing import Packing
from llmac.models.policy import TokenPolicy
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization
from llmac.runtime.saving import whole_weights

ON_FIRST = 6
"""Groups of the eight that rank 0 sampled; rank 1 has the others."""


def build(runtime):
    """The same policy each time."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.3,
        pad_token_id=None,
    )
    policy = TokenPolicy(AutoModelForCausalLM.from_config(config), temperature=1.0, chunk_mb=1.0)
    optimization = Optimization(lr=1e-2, eps=1e-3)
    learner = Learner(policy, optimization, runtime, name="actor", total_steps=2)
    return Actor(
        policy,
        learner,
        runtime,
        reference=None,
        packing=Packing(kind="trie", max_tokens=60, pad_id=0).fitting(policy.model),
        epochs=2,
        minibatches=1,
        ratio_tolerance=1e-4,
    )


def learnt(rows, runtime):
    """Weights and metrics after a step on the rows of all ranks."""
    actor, algorithm = build(runtime), GRPO(group_size=4)
    before = whole_weights(actor.model, keep=True)
    rollouts = actor.annotate(collate(rows, length_limit=8), reference=algorithm.uses_reference)
    credit = algorithm.credit(rollouts, None, sum_across=runtime.sum)
    metrics = actor.update(rollouts, credit, algorithm)
    after = whole_weights(actor.model, keep=True)
    groups = {t.group for t in rows}
    own = sum(
        distinct_tokens([t.prompt.token_ids + t.response_ids for t in rows if t.group == g])
        for g in groups
    )
    names = ("actor/grad_norm", "actor/pg_loss", "actor/entropy")
    return {
        "weights": after,
        "moved": max(float((after[name] - before[name]).abs().max()) for name in after),
        "metrics": {name: over_ranks(metrics[name], runtime) for name in names},
        "rows": runtime.gather(len(rows)),
        "imbalance": imbalance(runtime.gather(own)),
    }


def main(output):
    torch.set_num_threads(1)
    runtime = Runtime.create(seed=0, output=None)
    sampled = [t for t in trajectories() if (t.group >= ON_FIRST) == runtime.rank]
    moved, _ = balanced(sampled, SimpleNamespace(uneven=True), runtime)
    found = {"sampled": learnt(sampled, runtime), "balanced": learnt(moved, runtime)}
    if runtime.is_main:
        torch.save(found, output)
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
