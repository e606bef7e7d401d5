"""Engine and trainer that differ on purpose: a bfloat16 engine samples for a float32 policy.

Three policies take part: μ sampled (the engine's numbers), π_old is the trainer's at collection, π_θ
the trainer's now. The ratio that is clipped is π_θ/π_old; the weight that corrects is π_old/μ.
"""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llmac.algorithms.grpo import GRPO
from llmac.algorithms.rloo import RLOO
from llmac.build import build
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.core.protocols import Request, SamplingParams
from llmac.core.types import Prompt, Rollouts, Trajectory
from llmac.engines.hf_engine import HFEngine
from llmac.engines.probe import LOW_PRECISION_TOLERANCE
from llmac.loop import train
from llmac.models.packing import pack
from llmac.models.policy import TokenPolicy
from llmac.runtime.context import Runtime
from llmac.runtime.weights import full_weights

STEPS = 3


class Recording:
    """An engine that does everything as the real one, and remembers it."""

    def __init__(self, engine):
        self._engine = engine
        self.weights = {}
        self.completions = []

    @property
    def policy_version(self):
        return self._engine.policy_version

    def generate(self, requests):
        sampled = self._engine.generate(requests)
        self.completions += [
            (request, one)
            for request, several in zip(requests, sampled, strict=True)
            for one in several
        ]
        return sampled

    def load_weights(self, weights, version):
        seen = [(name, tensor.detach().clone()) for name, tensor in weights]
        self.weights[version] = dict(seen)
        self._engine.load_weights(seen, version)

    def sleep(self):
        self._engine.sleep()

    def wake(self):
        self._engine.wake()

    def close(self):
        self._engine.close()


@dataclass(frozen=True, kw_only=True)
class Watched(GRPO):
    """GRPO that remembers what its loss was asked."""

    asked: list = field(default_factory=list)

    def policy_loss(self, logprobs, rollouts, credit, *, entropy=None):
        loss = super().policy_loss(logprobs, rollouts, credit, entropy=entropy)
        self.asked.append(
            (logprobs.detach().clone(), rollouts, credit, loss.total.detach().clone())
        )
        return loss


@pytest.fixture(scope="module")
def rough_model(home, tmp_path_factory):
    """Weights so large that rounding them to bfloat16 is seen in every log-probability."""
    folder = tmp_path_factory.mktemp("rough") / "model"
    torch.manual_seed(3)
    config = Qwen2Config.from_pretrained(home / "model", initializer_range=0.6)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(folder)
    return folder


@pytest.fixture
def make_parts(rough_model, settings):
    """Parts of a run whose engine holds a bfloat16 copy, from a recipe with the given changes."""
    closers = []

    def make(algorithm=None, **actor):
        settings["model"]["name"] = str(rough_model)
        settings["algorithm"] |= algorithm or {}
        settings["actor"] |= actor
        settings["run"] |= {"steps": STEPS, "save_every": STEPS}
        recipe = load_recipe(settings)
        runtime = Runtime.create(seed=0, output=None)
        parts = build(recipe, runtime)
        parts.engine.close()
        model = AutoModelForCausalLM.from_pretrained(rough_model, dtype=torch.bfloat16)
        engine = Recording(HFEngine(model, AutoTokenizer.from_pretrained(rough_model)))
        parts = dataclasses.replace(
            parts, engine=engine, probe_tolerance=10 * LOW_PRECISION_TOLERANCE
        )
        closers.extend([runtime.close, parts.phases.close, parts.score.close, parts.log.close])
        return recipe, parts

    yield make
    for close in reversed(closers):
        close()


def collect(parts):
    """Steps 1 and 2 of the loop."""
    trajectories, _ = parts.plan.rollout(parts.engine, parts.prompts, parts.score, seed=5)
    batch = collate(trajectories, length_limit=parts.plan.length_limit)
    return parts.actor.annotate(batch, reference=False)


@torch.no_grad()
def plain_logprobs(model, prompt_ids, response_ids):
    """Log π of a response by one forward pass of transformers, in the model's own precision."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None])[:, 0].tolist()


def rows(padded, trajectories):
    return [
        row[: len(t.response_ids)].tolist() for row, t in zip(padded, trajectories, strict=True)
    ]


def test_old_logprobs_are_the_trainers_and_sampler_logprobs_the_engines(make_parts, rough_model):
    _, parts = make_parts()
    rollouts = collect(parts)
    trainer = AutoModelForCausalLM.from_pretrained(rough_model, dtype=torch.float32)
    assert parts.actor.model.dtype == torch.float32

    gaps = []
    for old, sampler, trajectory, (_, completion) in zip(
        rows(rollouts.old_logprobs, rollouts.trajectories),
        rows(rollouts.sampler_logprobs, rollouts.trajectories),
        rollouts.trajectories,
        parts.engine.completions,
        strict=True,
    ):
        expected = plain_logprobs(trainer, trajectory.prompt.token_ids, trajectory.response_ids)
        assert old == pytest.approx(expected, rel=0, abs=1e-5)
        assert trajectory.response_ids == completion.token_ids
        assert sampler == torch.tensor(completion.logprobs).tolist()
        gaps += [abs(a - b) for a, b in zip(expected, sampler, strict=True)]
    assert sum(gaps) / len(gaps) > 1e-3, (
        "engine and trainer must differ for this file to say anything"
    )


@pytest.mark.parametrize("low", [None, 0.99])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mismatch_weights_are_the_trainers_over_the_samplers_probability(
    make_parts, level, kind, low
):
    high = 1.005
    changes = {"mismatch": f"{level}_{kind}", "mismatch_low": low, "mismatch_high": high}
    _, parts = make_parts(changes)
    rollouts = collect(parts)
    credit = parts.algorithm.credit(rollouts, None)

    bound = Counter()
    expected = []
    for old, sampler in zip(
        rows(rollouts.old_logprobs, rollouts.trajectories),
        rows(rollouts.sampler_logprobs, rollouts.trajectories),
        strict=True,
    ):
        ratios = [math.exp(a - b) for a, b in zip(old, sampler, strict=True)]
        if level == "sequence":
            ratios = [math.prod(ratios)] * len(ratios)
        for ratio in ratios:
            below, above = low is not None and ratio < low, ratio > high
            bound[below - above] += 1
            if kind == "mask":
                expected.append(0.0 if below or above else ratio)
            else:
                expected.append(low if below else high if above else ratio)
    found = [w for row in rows(credit.importance, rollouts.trajectories) for w in row]
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(bound[0], bound[-1]) > 0
    assert (bound[1] > 0) == (low is not None)
    mean = sum(expected) / len(expected)
    assert credit.metrics["actor/mismatch_weight"].value == pytest.approx(mean, rel=1e-5)


def test_the_ratio_starts_at_one_and_moves_while_the_old_policy_stays(make_parts):
    _, parts = make_parts(epochs=3, minibatches=1, lr=2e-4)
    algorithm = Watched(mismatch="token_truncate", mismatch_high=1.005)
    rollouts = collect(parts)
    credit = algorithm.credit(rollouts, None)
    parts.actor.update(rollouts, credit, algorithm)

    mask = rollouts.action_mask
    assert len(algorithm.asked) == 3
    ratios = []
    for logprobs, seen, used, total in algorithm.asked:
        order = [rollouts.trajectories.index(t) for t in seen.trajectories]
        assert torch.equal(seen.old_logprobs, rollouts.old_logprobs[order])
        assert torch.equal(used.importance, credit.importance[order])
        where = mask[order]
        ratio = (logprobs - seen.old_logprobs).exp()
        bounded = torch.minimum(ratio * used.advantages, ratio.clamp(0.8, 1.2) * used.advantages)
        weight = (seen.old_logprobs - seen.sampler_logprobs).exp().clamp(max=1.005)
        per_row = (-bounded * weight * where).sum(1) / where.sum(1).clamp(min=1)
        torch.testing.assert_close(total, per_row.sum(), rtol=1e-4, atol=1e-6)
        ratios.append(ratio[where])
        if len(ratios) == 1:
            assert ((logprobs - seen.sampler_logprobs).exp() - 1)[where].abs().max() > 0.01
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=0, atol=1e-5)
    first_move, second_move = ((ratio - 1).abs().mean() for ratio in ratios[1:])
    assert 1e-3 < first_move < second_move


def test_a_whole_run_logs_the_gap_between_engine_and_trainer(make_parts):
    recipe, parts = make_parts({"mismatch": "token_truncate"}, epochs=2)
    train(recipe.run, parts)
    lines = [json.loads(line) for line in (parts.output / "metrics.jsonl").read_text().splitlines()]
    trainer = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    for step, logged in enumerate(lines, 1):
        # Step k is sampled, and looked at, with the weights of sync k - 1.
        trainer.load_state_dict(parts.engine.weights[step - 1], strict=False)
        trainer.tie_weights()
        differences = []
        for request, completion in parts.engine.completions:
            if request.params.n == parts.plan.group_size and completion.policy_version == step - 1:
                old = plain_logprobs(trainer, request.prompt_ids, completion.token_ids)
                differences += [a - b for a, b in zip(old, completion.logprobs, strict=True)]
        count = len(differences)
        assert count == logged["rollout/tokens"]
        expected = {
            "actor/sampler_kl": sum(math.expm1(d) - d for d in differences) / count,
            "actor/sampler_logprob_diff_mean": sum(map(abs, differences)) / count,
            "actor/sampler_logprob_diff_max": max(map(abs, differences)),
            "actor/sampler_ratio_mean": sum(map(math.exp, differences)) / count,
            "actor/mismatch_weight": sum(min(math.exp(d), 2.0) for d in differences) / count,
        }
        found = {name: logged[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found["actor/sampler_logprob_diff_mean"] > 1e-3
    assert len(lines) == STEPS


@dataclass(frozen=True, kw_only=True)
class World:
    """All answers of at most two tokens to one prompt, what they earn, and how likely each policy finds them."""

    samples: list
    trajectories: tuple
    """One for each answer that exists; `sampler_logprobs` are the engine's."""
    policy: TokenPolicy
    """The trainer's."""

    @property
    def mu(self):
        return torch.tensor([math.exp(math.fsum(t.sampler_logprobs)) for t in self.trajectories])

    @property
    def earned(self):
        return torch.tensor([t.reward for t in self.trajectories])

    def logprobs(self):
        """Of π, as the actor computes them, with gradient: [answers, 2]."""
        return self.policy(pack(self.trajectories, pad_id=0))[0]

    def gradient(self, objective):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(objective, list(self.policy.parameters()))]
        )

    def true_gradient(self):
        """Of the expected reward Σ π(y) r(y)."""
        chance = self.logprobs().sum(1).exp()
        assert float(chance.detach().sum()) == pytest.approx(1.0, abs=1e-5)
        return self.gradient((chance * self.earned).sum())

    def expected_gradient(self, algorithm):
        """Mean over all pairs of siblings that μ can sample, of the step the algorithm takes."""
        count = len(self.trajectories)
        left, right = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
        row = torch.stack([left, right], dim=1).flatten()
        trajectories = [
            dataclasses.replace(self.trajectories[i], group=place // 2)
            for place, i in enumerate(row.tolist())
        ]
        batch = collate(trajectories, length_limit=2)
        logprobs = self.logprobs()[row]
        rollouts = Rollouts(
            **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)},
            old_logprobs=logprobs.detach(),
            ref_logprobs=None,
        )
        credit = algorithm.credit(rollouts, None)
        # Σ_pairs μ(left) μ(right) · loss: the loss is linear in the advantages.
        chance = (self.mu[left] * self.mu[right]).repeat_interleave(2)[:, None]
        credit = dataclasses.replace(credit, advantages=credit.advantages * chance)
        loss = algorithm.policy_loss(logprobs, rollouts, credit)
        return -self.gradient(loss.total / 2)


@pytest.fixture(scope="module")
def world(home):
    """A bfloat16 engine, asked so often that no answer is missing, and its float32 trainer."""
    torch.manual_seed(4)
    config = Qwen2Config.from_pretrained(home / "model", vocab_size=5, initializer_range=0.2)
    model = Qwen2ForCausalLM(config).eval()
    engine = HFEngine(
        Qwen2ForCausalLM(config).to(torch.bfloat16),
        AutoTokenizer.from_pretrained(home / "model"),
    )
    engine.load_weights(full_weights(model), version=1)
    prompt = Prompt(id="p", token_ids=(2, 4, 3), source="")
    (samples,) = engine.generate(
        [
            Request(
                prompt_ids=prompt.token_ids,
                params=SamplingParams(n=20_000, max_new_tokens=2, seed=1),
            )
        ]
    )
    distinct = {one.token_ids: one for one in samples}
    trajectories = [
        Trajectory(
            prompt=prompt,
            response_ids=one.token_ids,
            action_mask=(True,) * len(one.token_ids),
            sampler_logprobs=one.logprobs,
            finish=one.finish,
            group=0,
            reward=one.token_ids.count(2)
            - 0.5 * one.token_ids.count(3)
            + 0.25 * len(one.token_ids),
        )
        for _, one in sorted(distinct.items())
    ]
    return World(
        samples=samples,
        trajectories=tuple(trajectories),
        policy=TokenPolicy(model, temperature=1.0, chunk_mb=64),
    )


def test_the_engine_samples_from_the_probabilities_it_reports(world):
    assert len(world.trajectories) == 1 + 4 * 5  # the end token; another and any
    assert float(world.mu.sum()) == pytest.approx(1.0, abs=1e-5)
    counts = Counter(one.token_ids for one in world.samples)
    found = torch.tensor([counts[t.response_ids] for t in world.trajectories])
    expected = world.mu * len(world.samples)
    # χ² with 20 degrees of freedom; above 52 by chance once in 10,000 times.
    assert float(((found - expected).square() / expected).sum()) < 52


def test_importance_weights_make_the_expected_gradient_that_of_the_trainers_policy(world):
    truth = world.true_gradient()

    def bias(mismatch, **bounds):
        algorithm = RLOO(group_size=2, mismatch=mismatch, **bounds)
        return float((world.expected_gradient(algorithm) - truth).norm() / truth.norm())

    corrected = bias("sequence_truncate", mismatch_high=1e6)
    per_token = bias("token_truncate", mismatch_high=1e6)
    uncorrected = bias("off")
    assert corrected < 1e-5
    assert uncorrected > 1e-3
    # Token weights correct each choice, not which states μ brings about.
    assert 1e-4 < per_token < uncorrected
    # A bound that cuts has its price.
    assert bias("sequence_truncate", mismatch_high=1.0) > 100 * corrected
