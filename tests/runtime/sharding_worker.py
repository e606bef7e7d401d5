"""Learns from fixed trajectories on however many processes it is started with, and writes what came out.

Run by tests/runtime/test_sharding.py: `python sharding_worker.py OUTPUT TOKENS_PER_MICROBATCH CASE ...`, the cases
those of `CASES`. In between it saves, continues in fresh modules, perturbs and restores.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

from llmac.actor import Actor, Reference
from llmac.algorithms import ALGORITHMS
from llmac.algorithms.base import Algorithm
from llmac.config.schema import LoraConfig
from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.critics.bench import CriticBench
from llmac.critics.head_critic import HeadCritic
from llmac.critics.head_start import adapted
from llmac.critics.value_head import ValueHeadConfig
from llmac.models.loading import add_lora
from llmac.models.packing import Packing
from llmac.models.policy import TokenPolicy
from llmac.models.value_model import ValueModel
from llmac.rewards.loader import resolve
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization
from llmac.runtime.saving import whole_weights

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


CASES = {
    "grpo": {"algorithm": "grpo"},
    "ppo": {"algorithm": "ppo", "options": {"kl_coef": 0.01}},
    "ppo lora": {"algorithm": "ppo", "options": {"kl_coef": 0.01}, "lora": True},
    "ppo shared": {"algorithm": "ppo", "trunk": "shared"},
    "ppo shared lora": {"algorithm": "ppo", "trunk": "shared", "lora": True},
    "ppo trie": {"algorithm": "ppo", "options": {"kl_coef": 0.01}, "packing": "trie"},
    "ppo shared lora trie": {
        "algorithm": "ppo",
        "trunk": "shared",
        "lora": True,
        "packing": "trie",
    },
}


@dataclass(frozen=True)
class Model:
    """What a critic reads of the recipe's model section."""

    lora: LoraConfig | None
    dtype: str = "float32"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Job:
    """Everything that learns."""

    actor: Actor
    critic: HeadCritic | None
    algorithm: Algorithm

    def parts(self):
        return [part for part in (self.actor, self.critic) if part is not None]


def build(runtime, tokens, *, algorithm, options=None, lora=False, trunk="own", packing="padded"):
    """The same weights on every rank and in every job."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    adapters = LoraConfig(r=2, alpha=8) if lora else None
    card = resolve(ALGORITHMS[algorithm])
    algorithm = card(group_size=GROUP, aggregation="token_mean", **(options or {}))

    def policy(seed):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)

    model = policy(5) if adapters is None else add_lora(policy(5), adapters)
    # Four rows of logits a chunk: every sharded output layer is gathered again and again.
    trained = TokenPolicy(model, temperature=1.0, chunk_mb=4 * 4 * 19 / 2**20)
    reference, models = None, [model]
    if algorithm.uses_reference:
        frozen = TokenPolicy(policy(6), temperature=1.0, chunk_mb=1.0)
        models.append(frozen)
        reference = (
            Reference(None, model.disable_adapter) if lora else Reference(runtime.freeze(frozen))
        )
    settings = {"runtime": runtime, "total_steps": 8}
    # A large epsilon: Adam otherwise magnifies rounding of tiny gradients to whole steps.
    optimization = Optimization(lr=1e-2, eps=1e-3)
    actor = Actor(
        trained,
        Learner(trained, optimization, name="actor", **settings),
        runtime,
        reference=reference,
        packing=Packing(kind=packing, max_tokens=tokens, pad_id=0).fitting(*models),
        epochs=2,
        minibatches=2,
        ratio_tolerance=1e-4,
    )
    if not card.default_critic:
        return Job(actor, None, algorithm)
    value = ValueHeadConfig(lr=1e-2, eps=1e-3, epochs=2, trunk=trunk, lora=lora and trunk == "own")
    torch.manual_seed(7)
    own = ValueModel(AutoModel.from_config(config), value.spec(config.hidden_size))
    bench = CriticBench(
        runtime=runtime,
        model=Model(adapters),
        policy=trained,
        policy_states=actor.hidden,
        engine=None,
        score=None,
        pad_id=0,
        packing=packing,
        minibatches=2,
        max_tokens_per_microbatch=tokens,
        steps=2,
        compute_dtype=None,
        before_learning=lambda: None,
    )
    if trunk == "shared":
        return Job(actor, value.build(bench), algorithm)
    critic = value.around(adapted(own, bench) if value.lora else own, bench, fresh_head=True)
    return Job(actor, critic, algorithm)


def step(job, runtime):
    """One step of the loop on this rank's share; returns the metrics."""
    mine = [t for t in trajectories() if t.group % runtime.world_size == runtime.rank]
    algorithm, actor, critic = job.algorithm, job.actor, job.critic
    rollouts = actor.annotate(collate(mine, length_limit=8), reference=algorithm.uses_reference)
    values = critic.values(rollouts, algorithm.segments(rollouts)) if critic else None
    credit = algorithm.credit(rollouts, values, sum_across=runtime.sum)
    metrics = actor.update(rollouts, credit, algorithm)
    if critic and credit.critic_targets:
        metrics |= critic.update(rollouts, credit.critic_targets)
    wanted = ("actor/grad_norm", "critic/grad_norm", "actor/pg_loss", "critic/vf_loss")
    return {name: over_ranks(metrics[name], runtime) for name in wanted if name in metrics}


def over_ranks(mean, runtime):
    """A mean whose numerator and denominator are sums over ranks."""
    both = torch.tensor([float(mean.total), float(mean.weight)], dtype=torch.float64)
    total, weight = runtime.sum(both).tolist()
    return total / weight


def weights_of(job):
    """Whole weights of policy and critic, adapters merged."""
    found = whole_weights(job.actor.model, keep=True)
    if job.critic is not None:
        head = whole_weights(job.critic._model.head, keep=True)
        found |= {f"head.{name}": w for name, w in head.items()}
        if job.critic._config.trunk == "own":
            trunk = whole_weights(job.critic._model.backbone, keep=True)
            found |= {f"critic.{name}": w for name, w in trunk.items()}
    return found


def run(case, runtime, tokens, folder):
    """What one case learns in five steps, saved and continued in between."""
    job = build(runtime, tokens, **CASES[case])
    before = weights_of(job)
    metrics = [step(job, runtime) for _ in range(2)]
    for number, part in enumerate(job.parts()):
        if runtime.is_main:
            (folder / str(number)).mkdir(parents=True)
        runtime.barrier()
        part.save(folder / str(number))
    runtime.barrier()
    metrics += [step(job, runtime) for _ in range(3)]
    after = weights_of(job)

    resumed = build(runtime, tokens, **CASES[case])
    for number, part in enumerate(resumed.parts()):
        part.load(folder / str(number))
    again = [step(resumed, runtime) for _ in range(3)]
    assert again == metrics[2:], (again, metrics[2:])
    assert_equal(weights_of(resumed), after)

    with job.actor.perturbed():
        inside = whole_weights(job.actor.model, keep=True)
        assert all(not torch.equal(inside[name], after[name]) for name in inside)
        noisy = job.actor.logprobs_of((1, 2), (3, 4))
    assert_equal(weights_of(job), after)
    assert noisy != job.actor.logprobs_of((1, 2), (3, 4))
    # Every rank has the same whole weights.
    sums = {name: float(w.double().sum()) for name, w in after.items()}
    assert all(sums == other for other in runtime.gather(sums))
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    return {"weights": after, "metrics": metrics, "moved": moved}


def assert_equal(found, wanted):
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, different


def main(output, tokens, cases):
    torch.set_num_threads(1)
    runtime = Runtime.create(seed=0, output=None)
    results = {
        case: run(case, runtime, tokens, output.parent / f"{output.stem} {case}") for case in cases
    }
    if runtime.is_main:
        torch.save(results, output)
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
