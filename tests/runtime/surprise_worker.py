"""Teaches the surprise critic for two steps on however many processes it is started with.

Run by tests/runtime/test_surprise_sharded.py: `python surprise_worker.py OUTPUT`. It is saved and continued in between.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from sharding_worker import trajectories

from llmac.core.collate import collate
from llmac.core.types import CriticTargets, Rollouts
from llmac.critics.bench import CriticBench
from llmac.critics.surprise import SurpriseConfig
from llmac.runtime.context import Runtime
from llmac.runtime.saving import whole_weights


def built(runtime):
    """The same on every rank and in every run."""
    torch.manual_seed(5)
    # A large epsilon: Adam otherwise magnifies rounding of tiny gradients to whole steps.
    config = SurpriseConfig(eps=1e-2, epochs=1, minibatches=2)
    others = {field.name: None for field in dataclasses.fields(CriticBench)}
    return config.build(
        CriticBench(**others | {"runtime": runtime, "steps": 2, "before_learning": lambda: None})
    )


def step(critic, rollouts):
    """Asks and teaches once; returns the values."""
    mask = rollouts.action_mask
    values = critic.values(rollouts, mask)
    returns = rollouts.rewards.sum(1, keepdim=True).expand_as(values.at) * mask
    critic.update(rollouts, CriticTargets(returns=returns, value_mask=mask, old_values=values.at))
    return values.at


def main(output):
    torch.set_num_threads(1)
    runtime = Runtime.create(seed=0, output=None)
    mine = [t for t in trajectories() if t.group % runtime.world_size == runtime.rank]
    batch = collate(mine, length_limit=8)
    surprised = -batch.response_ids.float() / 4 * batch.action_mask
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    rollouts = Rollouts(**fields, old_logprobs=surprised, ref_logprobs=None)
    critic, folder = built(runtime), output.parent / f"{output.stem} critic"
    step(critic, rollouts)
    if runtime.is_main:
        folder.mkdir()
    runtime.barrier()
    critic.save(folder)
    runtime.barrier()
    step(critic, rollouts)
    again = built(runtime)
    again.load(folder)
    step(again, rollouts)
    assert torch.equal(step(again, rollouts), step(critic, rollouts))
    critic.save_pretrained(folder / "shipped", policy=folder)
    weights = whole_weights(critic._network, keep=True)
    if runtime.is_main:
        torch.save(dict(weights), output)
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
