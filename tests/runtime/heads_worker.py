"""Teaches every kind of value head for two steps on however many processes it is started with.

Run by tests/runtime/test_heads_sharded.py: `python heads_worker.py OUTPUT NAME ...`, the names those of `HEADS`. In
between each critic is saved and continued in a fresh one, and shipped and loaded at the end.
"""

import sys
from pathlib import Path

import torch
from sharding_worker import Model, over_ranks, trajectories
from transformers import AutoModel, Qwen2Config

from llmac.core.collate import collate
from llmac.core.types import CriticTargets, Rollouts
from llmac.critics import CRITICS
from llmac.critics.bench import CriticBench
from llmac.models.packing import pack
from llmac.models.value_model import ValueModel
from llmac.rewards.loader import resolve
from llmac.runtime.context import Runtime
from llmac.runtime.saving import whole_weights

TWINS = {"heads": 2, "combine": "soft_min", "layer_norm": True, "activation": "gelu"}
HEADS = {
    "value_head": {},
    "bernoulli": {},
    "hl_gauss": {},
    "two_hot": {"bins": 11},
    "c51": {"bins": 11},
    "quantile": {},
    "gaussian": {},
    "outcome_classes": {"rewards": (0.0, 0.5, 1.0)},
    "value_head twins": {**TWINS, "ensemble_loss": "combined"},
    "hl_gauss twins": TWINS,
    "value_head layers": {"hidden_layers": (8, 4)},
    "value_head running": {"normalize": "running"},
    "value_head popart": {"normalize": "popart"},
    "value_head target": {"target_tau": 0.5},
}
CONFIG = Qwen2Config(
    vocab_size=19,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    initializer_range=0.3,
    pad_token_id=None,
)


def built(name, runtime):
    """The same on every rank and in every run."""
    card = resolve(CRITICS[name.split()[0]])
    # A large epsilon: Adam otherwise magnifies rounding of tiny gradients to whole steps.
    config = card(lr=2e-2, eps=1e-2, **HEADS[name])
    torch.manual_seed(5)
    model = ValueModel(AutoModel.from_config(CONFIG), config.spec(CONFIG.hidden_size))
    bench = CriticBench(
        runtime=runtime,
        model=Model(None),
        policy=None,
        policy_states=None,
        engine=None,
        score=None,
        pad_id=0,
        minibatches=2,
        max_tokens_per_microbatch=30 if runtime.world_size > 1 else 10_000,
        steps=2,
        compute_dtype=None,
        before_learning=lambda: None,
    )
    return config.around(model, bench, fresh_head=True)


def step(critic, rollouts, runtime):
    """Asks and teaches once; returns the metrics."""
    mask = rollouts.action_mask
    values = critic.values(rollouts, mask)
    returns = rollouts.rewards.sum(1, keepdim=True).expand_as(values.at) * mask
    targets = CriticTargets(returns=returns, value_mask=mask, old_values=values.at)
    metrics = critic.update(rollouts, targets)
    averaged = ("vf_loss", "vf_target_clipfrac", "values/spread", "grad_norm")
    found = {name: metrics.get(f"critic/{name}") for name in averaged}
    return {name: over_ranks(mean, runtime) for name, mean in found.items() if mean is not None}


def run(name, rollouts, runtime, folder):
    """What one head learns in two steps."""
    critic = built(name, runtime)
    metrics = [step(critic, rollouts, runtime)]
    if runtime.is_main:
        folder.mkdir(parents=True)
    runtime.barrier()
    critic.save(folder)
    runtime.barrier()
    metrics.append(step(critic, rollouts, runtime))
    values = critic.values(rollouts, rollouts.action_mask).at

    again = built(name, runtime)
    again.load(folder)
    assert step(again, rollouts, runtime) == metrics[1]
    assert torch.equal(again.values(rollouts, rollouts.action_mask).at, values)

    critic.save_pretrained(folder / "shipped", policy=folder)
    runtime.barrier()
    if "target" not in name:  # whose values are those of the copy
        with torch.no_grad():
            loaded = ValueModel.from_pretrained(folder / "shipped")
            said = loaded(pack(rollouts.trajectories, pad_id=0))[:, :-1] * rollouts.action_mask
        torch.testing.assert_close(said, values, rtol=1e-4, atol=1e-5)
    weights = whole_weights(critic._model.head, keep=True)
    return {"weights": weights, "metrics": metrics}


def main(output, names):
    torch.set_num_threads(1)
    runtime = Runtime.create(seed=0, output=None)
    mine = [t for t in trajectories() if t.group % runtime.world_size == runtime.rank]
    batch = collate(mine, length_limit=8)
    fields = ("response_ids", "action_mask", "rewards", "truncated", "group", "sampler_logprobs")
    rollouts = Rollouts(
        **{name: getattr(batch, name) for name in fields},
        old_logprobs=batch.sampler_logprobs,
        ref_logprobs=None,
        length_limit=8,
        trajectories=batch.trajectories,
    )
    results = {
        name: run(name, rollouts, runtime, output.parent / f"{output.stem} {name}")
        for name in names
    }
    if runtime.is_main:
        torch.save(results, output)
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
