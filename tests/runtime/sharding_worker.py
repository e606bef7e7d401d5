"""Learns from fixed trajectories on however many processes it is started with, and writes what came out.

Run by tests/runtime/test_sharding.py: `python sharding_worker.py OUTPUT ALGORITHM TOKENS_PER_MICROBATCH`.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

from llmac.actor import Actor
from llmac.algorithms import ALGORITHMS
from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.critics.value_head import ValueHead, ValueHeadConfig
from llmac.models.policy import TokenPolicy
from llmac.models.value_model import ValueModel
from llmac.rewards.loader import resolve
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization

PROMPTS, GROUP = 8, 4


def trajectories():
    """The global batch: ragged, several rewards, some truncated."""
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return tuple(torch.randint(1, 19, (count,), generator=generator).tolist())

    for group in range(PROMPTS):
        prompt = Prompt(id=f"p{group}", token_ids=ids(2 + group % 3), source="?")
        for _ in range(GROUP):
            length = int(torch.randint(1, 9, (), generator=generator))
            yield Trajectory(
                prompt=prompt,
                response_ids=ids(length),
                action_mask=(True,) * length,
                sampler_logprobs=(-2.5,) * length,
                finish=Finish.LENGTH if length == 8 else Finish.STOP,
                group=group,
                reward=float(torch.rand((), generator=generator) > 0.6),
            )


def main(output, algorithm_name, tokens):
    torch.set_num_threads(1)
    runtime = Runtime.create(seed=0, output=None)
    card = resolve(ALGORITHMS[algorithm_name])
    options = {"group_size": GROUP, "aggregation": "token_mean"}
    algorithm = card(**options)
    mine = [t for t in trajectories() if t.group % runtime.world_size == runtime.rank]

    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.3,
    )
    policy = TokenPolicy(AutoModelForCausalLM.from_config(config), temperature=1.0, chunk_mb=1.0)
    value_model = ValueModel(AutoModel.from_config(config))

    def learner(module, name):
        return Learner(module, Optimization(lr=1e-2, eps=1e-3), runtime, name=name, total_steps=8)

    actor = Actor(
        policy,
        learner(policy, "actor"),
        runtime,
        reference=None,
        pad_id=0,
        epochs=2,
        minibatches=2,
        max_tokens_per_microbatch=tokens,
        ratio_tolerance=1e-4,
    )
    critic = ValueHead(
        value_model,
        learner(value_model, "critic"),
        runtime,
        ValueHeadConfig(epochs=2),
        pad_id=0,
        minibatches=2,
        max_tokens_per_microbatch=tokens,
        fresh_head=True,
    )
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for _ in range(2):
        rollouts = actor.annotate(collate(mine, length_limit=8), reference=False)
        values = (
            critic.values(rollouts, algorithm.segments(rollouts)) if card.default_critic else None
        )
        credit = algorithm.credit(rollouts, values, sum_across=runtime.sum)
        if credit.critic_targets:
            critic.update(rollouts, credit.critic_targets)
        metrics = actor.update(rollouts, credit, algorithm)
    if runtime.is_main:
        weights = {
            **policy.state_dict(),
            **{f"critic.{k}": v for k, v in value_model.state_dict().items()},
        }
        moved = max(
            float((p.detach() - start[name]).abs().max()) for name, p in policy.named_parameters()
        )
        torch.save(
            {"weights": weights, "moved": moved, "grad_norm": metrics["actor/grad_norm"].value},
            output,
        )
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
