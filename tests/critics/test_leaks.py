"""No critic looks ahead: V(s_t) stays when the tokens from t on become others, more, or fewer."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llmac.config import load_recipe
from llmac.config.cards import card_class, card_fields, choose_algorithm, choose_critic
from llmac.config.schema import ModelConfig
from llmac.core.collate import collate
from llmac.core.protocols import Observer, SamplingParams
from llmac.core.types import CriticTargets, Finish, Prompt, Rollouts, Trajectory, Values
from llmac.critics import CRITICS
from llmac.critics.bench import CriticBench
from llmac.critics.head_critic import HeadCritic
from llmac.engines.hf_engine import HFEngine
from llmac.models.loading import load_causal_lm
from llmac.models.policy import TokenPolicy
from llmac.new_actor import model_named, new_actor
from llmac.new_engine import speaking
from llmac.runtime.context import Runtime

VOCABULARY, ROWS, LENGTH, LIMIT = 13, 12, 7, 10
EXTREMES = (0, 2, LENGTH - 1)
"""Positions from which the future is another one."""
TOLERANCE = 1e-5
"""Rounding: rows of other lengths are packed otherwise."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What `build` puts on the table, of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "critic.jinja").write_text("{{ problem }} {{ partial }} w12")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    tokenizer.save_pretrained(folder)
    spec, runtime = ModelConfig(name=str(folder)), Runtime.create(seed=0, output=None)
    policy = TokenPolicy(load_causal_lm(spec), temperature=1.0, chunk_mb=1)

    def hidden(rows):
        with torch.no_grad():
            return policy(rows, hidden_only=True)[0]

    recipe = load_recipe(
        {
            "model": {"name": str(folder)},
            "data": {"name": "none"},
            "reward": "none.py:none",
            "algorithm": "ppo",
            "run": {"steps": 1, "output": "none"},
        }
    )

    def new_player(*_):
        return speaking(HFEngine(load_causal_lm(spec), tokenizer), tokenizer)

    player = new_player()
    yield CriticBench(
        runtime=runtime,
        model=spec,
        policy=policy,
        policy_states=hidden,
        engine=player.engine,
        player=player,
        new_player=new_player,
        new_policy=lambda order: new_actor(
            order, recipe, runtime, pad_id=0, before_learning=lambda: None
        )[0],
        model_named=partial(model_named, spec),
        score=lambda ts: [dataclasses.replace(t, reward=outcome(t.response_ids)) for t in ts],
        sampling=SamplingParams(),
        pad_id=0,
        minibatches=2,
        max_tokens_per_microbatch=64,
        steps=10,
        compute_dtype=None,
        before_learning=lambda: None,
    )
    runtime.close()


def outcome(response_ids):
    return float(sum(response_ids) % 3 == 0)


def responses(generator):
    """Four responses to each of three prompts, of the same length."""
    tokens = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=generator).tolist()
    return [
        Trajectory(
            prompt=Prompt(id=f"p{row // 4}", token_ids=(2, 3 + row // 4), source="?"),
            response_ids=tuple(ids),
            action_mask=(True,) * LENGTH,
            sampler_logprobs=tuple((-torch.rand(LENGTH, generator=generator)).tolist()),
            finish=Finish.STOP,
            group=row // 4,
            reward=outcome(ids),
            value_span=(0.25, 0.75),  # of a plan that knows, for the critic that repeats it
        )
        for row, ids in enumerate(tokens)
    ]


def rollouts_of(trajectories):
    batch = collate(trajectories, length_limit=LIMIT)
    names = ("response_ids", "action_mask", "rewards", "truncated", "group", "sampler_logprobs")
    return Rollouts(
        **{name: getattr(batch, name) for name in names},
        old_logprobs=batch.sampler_logprobs,
        ref_logprobs=None,
        length_limit=LIMIT,
        trajectories=batch.trajectories,
    )


def with_tokens(trajectory, at, ids, logprob=-2.0):
    """The same up to `at` and the same reward, then other tokens."""
    size = at + len(ids)
    return dataclasses.replace(
        trajectory,
        response_ids=(*trajectory.response_ids[:at], *ids),
        action_mask=(True,) * size,
        sampler_logprobs=(*trajectory.sampler_logprobs[:at], *[logprob] * len(ids)),
    )


def other_futures(trajectories, at, length, generator):
    """From `at` on other tokens, up to `length`."""
    size = (length - at,)
    return [
        with_tokens(t, at, torch.randint(2, VOCABULARY, size, generator=generator).tolist())
        for t in trajectories
    ]


def values_up_to(critic, trajectories, at):
    rollouts = rollouts_of(trajectories)
    return critic.values(rollouts, rollouts.action_mask).at[:, : at + 1]


def leak(critic, trajectories):
    """How far values move when only what comes after them does: 0 for an honest critic."""
    generator = torch.Generator().manual_seed(7)
    moved = [
        values_up_to(critic, other_futures(trajectories, at, length, generator), at)
        - values_up_to(critic, trajectories, at)
        for at, length in itertools.product(EXTREMES, (LENGTH, LIMIT, LENGTH - 1))
        if length > at
    ]
    return float(max(x.abs().max() for x in moved))


def taught(name, settings, bench):
    """A critic that has seen a few steps and is no constant any more."""
    fast = {"lr": 1e-2} if "lr" in card_fields(card_class("critic", name)) else {}
    if name == "generative":
        # It never finds a score here; test_generative.py has one that does.
        fast |= {"max_new_tokens": 4, "template": f"{bench.model.name}/critic.jinja"}
    choice = choose_critic({"name": name, **fast, **settings}, choose_algorithm("ppo"))
    torch.manual_seed(0)
    critic = choice.settings.build(bench)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        rollouts = rollouts_of(responses(generator))
        mask = rollouts.action_mask
        values = critic.values(rollouts, mask)
        returns = rollouts.rewards.sum(1, keepdim=True).expand(mask.shape) * mask
        critic.update(
            rollouts, CriticTargets(returns=returns, value_mask=mask, old_values=values.at)
        )
        if isinstance(critic, Observer):
            critic.observe(rollouts)
    return critic


SHAPES = [
    ("value_head", {"trunk": "shared"}),
    ("value_head", {"heads": 2, "combine": "min", "target_tau": 0.5}),
]


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in CRITICS), *SHAPES], ids=str
)
def test_no_critic_knows_what_comes(name, settings, bench):
    critic = taught(name, settings, bench)
    trajectories = responses(torch.Generator().manual_seed(2))
    assert leak(critic, trajectories) < TOLERANCE
    if isinstance(critic, HeadCritic) or name == "surprise":
        # Or the test would say nothing: these critics do look at what has been.
        others = [with_tokens(t, 0, [5, *t.response_ids[1:]]) for t in trajectories]
        before, after = (values_up_to(critic, ts, LENGTH - 1) for ts in (trajectories, others))
        assert (before - after)[:, 1:].abs().max() > 100 * TOLERANCE


class Peeking:
    """Says V after the action instead of before it."""

    def values(self, rollouts, starts):
        return self.saying(rollouts.response_ids.cumsum(1).float(), rollouts, starts)

    def saying(self, at, rollouts, starts):
        return Values(at=at * starts, starts=starts, bootstrap=torch.zeros(len(at)))


class Measuring(Peeking):
    """Knows how long the response will be."""

    def values(self, rollouts, starts):
        lengths = rollouts.action_mask.sum(1, keepdim=True).float()
        return self.saying(lengths.expand(starts.shape), rollouts, starts)


class LookingBothWays(Peeking):
    """Averages over the whole response, as a model without causal mask does."""

    def values(self, rollouts, starts):
        mean = rollouts.response_ids.float().mean(1, keepdim=True)
        return self.saying(mean.expand(starts.shape), rollouts, starts)


class LookingAtTheLast(Peeking):
    """Knows the last token of a response of full length."""

    def values(self, rollouts, starts):
        last = rollouts.response_ids[:, -1:].float()
        return self.saying(last.expand(starts.shape), rollouts, starts)


@pytest.mark.parametrize("critic", [Peeking, Measuring, LookingBothWays, LookingAtTheLast])
def test_a_critic_that_looks_ahead_is_caught(critic):
    assert leak(critic(), responses(torch.Generator().manual_seed(2))) > 0.1


def test_a_head_that_reads_one_token_too_far_is_caught(bench):
    critic = taught("value_head", {}, bench)
    ask = critic._learner.look

    def shifted(forward, micro_batches, **options):
        ahead = [
            dataclasses.replace(rows, states=(rows.states + 1).clamp(max=rows.states.max()))
            for rows in micro_batches
        ]
        return ask(forward, ahead, **options)

    critic._learner.look = shifted
    assert leak(critic, responses(torch.Generator().manual_seed(2))) > 100 * TOLERANCE
