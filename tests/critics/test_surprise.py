"""The critic that reads how surprised the policy was: exact features, causal, learns, comes back from disk."""

import dataclasses
import json
import math

import pytest
import torch

from llmac.core.surprise import FEATURES, LOWEST, surprise
from llmac.core.types import Finish
from llmac.critics.surprise import Surprise, SurpriseConfig
from llmac.errors import CheckpointError
from llmac.runtime.context import Runtime

from .making import asked, bench, rollouts_of, taught, trajectory


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def critic_of(runtime, **settings):
    torch.manual_seed(0)
    return SurpriseConfig(**settings).build(bench(runtime))


def sampled(logprobs, reward, finish=Finish.STOP):
    """A response whose tokens say nothing: only their log-probs do."""
    return dataclasses.replace(
        trajectory([5] * len(logprobs), reward, finish), sampler_logprobs=tuple(logprobs)
    )


def responses():
    """A surprising token spoils the response, wherever it is."""
    rows = [sampled([-0.1] * 6, 1.0) for _ in range(6)]
    for place in range(5):
        logprobs = [-0.1] * 6
        logprobs[place] = -4.0
        rows.append(sampled(logprobs, 0.0))
    return rollouts_of(rows)


def test_features_are_those_of_the_formulas():
    p = [0.9, 0.2, 0.05]
    found = surprise(torch.tensor([p]).log(), torch.ones(1, 3, dtype=torch.bool), length_limit=6)
    nats = [math.log(x) for x in p]
    last = [0, nats[0] / 4, nats[1] / 4, nats[2] / 4]
    lowest = last  # they fall
    total = [0, -nats[0], -nats[0] - nats[1], -nats[0] - nats[1] - nats[2]]
    # below .5: .2 and .05; below .25: the same; below .1: .05
    expected = [
        last,
        lowest,
        [1, *p],
        [math.log1p(x) for x in total],
        [0, 0, math.log(2), math.log(3)],
        [0, 0, math.log(2), math.log(3)],
        [0, 0, 0, math.log(2)],
        [0, 1 / 6, 2 / 6, 3 / 6],
    ]
    assert found.shape == (1, 4, FEATURES)
    torch.testing.assert_close(found[0].T, torch.tensor(expected), atol=1e-6, rtol=0)


def test_injected_tokens_surprise_nobody_and_the_impossible_is_bounded():
    mask = torch.tensor([[True, False, True]])
    found = surprise(torch.tensor([[-1.0, -9.0, -50.0]]), mask, length_limit=3)
    assert found[0, :, 1].tolist() == [0.0, -0.25, -0.25, LOWEST / 4]


def test_a_feature_has_not_seen_the_tokens_from_its_state_on():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 7, generator=generator) * 5
    mask = torch.ones(3, 7, dtype=torch.bool)
    before = surprise(logprobs, mask, length_limit=9)
    for at in range(7):
        other = logprobs.clone()
        other[:, at:] = -torch.rand(3, 7 - at, generator=generator) * 5
        after = surprise(other, mask, length_limit=9)
        assert torch.equal(after[:, : at + 1], before[:, : at + 1])
        assert not torch.equal(after[:, at + 1], before[:, at + 1])


def test_a_length_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="length_limit must be at least 1 token, found 0"):
        surprise(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), length_limit=0)


def test_it_starts_at_the_mean_reward_and_learns_which_surprises_are_failures(runtime):
    rollouts = responses()
    critic = critic_of(runtime, lr=3e-2)
    start = asked(critic, rollouts).at
    assert start[rollouts.action_mask].tolist() == pytest.approx([6 / 11] * 66, abs=1e-5)
    taught(critic, rollouts, 30)
    values = asked(critic, rollouts).at
    assert values[:6, -1].min() > 0.9
    for place in range(5):  # known as soon as it was sampled, and not before
        assert values[6 + place, place + 1 :].max() < 0.1
        assert values[6 + place, : place + 1].min() > 0.4


def test_values_are_in_reward_units_and_returns_outside_are_counted(runtime):
    rollouts = responses()
    rollouts = dataclasses.replace(rollouts, rewards=rollouts.rewards * 6 - 3 * rollouts.rewards)
    critic = critic_of(runtime, reward_range=(-2.0, 2.0))
    assert asked(critic, rollouts).at[0, 0] == pytest.approx(18 / 11, abs=1e-5)
    metrics = taught(critic, rollouts, 1)
    assert metrics["critic/vf_target_clipfrac"].value == pytest.approx(6 / 11)


def test_a_cut_response_is_worth_something_at_its_end(runtime):
    rows = [sampled([-0.1] * 3, 1.0, Finish.LENGTH), sampled([-0.1] * 5, 0.0)]
    values = asked(critic_of(runtime), rollouts_of(rows))
    assert values.bootstrap.tolist() == pytest.approx([0.5, 0.0], abs=1e-5)


def test_it_continues_from_a_checkpoint_and_from_a_shipped_folder(runtime, tmp_path):
    rollouts = responses()
    critic = critic_of(runtime, width=16)
    taught(critic, rollouts, 5)
    wanted = asked(critic, rollouts).at
    checkpoint, shipped = tmp_path / "checkpoint", tmp_path / "shipped"
    checkpoint.mkdir()
    critic.save(checkpoint)
    critic.save_pretrained(shipped, policy=tmp_path)
    again = critic_of(runtime, width=16)
    again.load(checkpoint)
    failures = dataclasses.replace(rollouts, rewards=0 * rollouts.rewards)
    assert torch.equal(asked(again, failures).at, wanted)  # it does not start over at their mean
    taught(critic, rollouts, 1)
    taught(again, rollouts, 1)
    assert torch.equal(asked(again, rollouts).at, asked(critic, rollouts).at)
    other = critic_of(runtime, width=16, init=str(shipped))
    assert torch.equal(asked(other, failures).at, wanted)
    assert json.loads((shipped / "surprise.json").read_text()) == {"width": 16}


def test_what_cannot_be_started_from_is_refused(runtime, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no surprise\.safetensors"):
        critic_of(runtime, init=str(tmp_path))
    critic_of(runtime, width=8).save_pretrained(tmp_path, policy=tmp_path)
    with pytest.raises(CheckpointError, match=r"has width 8, and critic\.width is 64"):
        critic_of(runtime, init=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_range": (1.0, 1.0)}, "reward_range must be"),
        ({"width": 0}, "width must be at least 1, found 0"),
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"minibatches": 0}, "minibatches must be at least 1, found 0"),
        ({"reward_range": (0.0, math.inf)}, r"reward_range must be \(failure, success\)"),
        ({"reward_range": (math.nan, 1.0)}, r"reward_range must be \(failure, success\)"),
        ({"lr": -1.0}, "lr must be finite and above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SurpriseConfig(**settings)


def test_the_name_in_a_recipe_builds_it(runtime):
    assert isinstance(critic_of(runtime), Surprise)


def test_a_critic_saved_before_anything_ended_still_starts_at_the_mean(runtime, tmp_path):
    critic = critic_of(runtime)
    asked(critic, rollouts_of([sampled([-0.1] * 3, None, Finish.PAUSED)]))
    critic.save(tmp_path)
    again = critic_of(runtime)
    again.load(tmp_path)
    won = rollouts_of([sampled([-0.1] * 3, 1.0)] * 3 + [sampled([-0.1] * 3, 0.0)])
    assert asked(again, won).at[0].tolist() == pytest.approx([0.75] * 3)
    again.save(tmp_path)
    third = critic_of(runtime)
    third.load(tmp_path)
    lost = rollouts_of([sampled([-0.1] * 3, 0.0)])
    assert asked(third, lost).at[0].tolist() == pytest.approx([0.75] * 3)
    (tmp_path / "critic.json").unlink()  # as checkpoints were before
    critic.load(tmp_path)
    assert asked(critic, lost).at[0].tolist() == pytest.approx([0.75] * 3)
