"""The value-head critic: calm at step 0, right positions, right clip, and it learns what it is shown."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmac.core.diagnostics import explained_variance
from llmac.core.segments import every_token
from llmac.core.types import CriticTargets, Finish
from llmac.critics.value_head import ValueHeadConfig
from llmac.models.policy import TokenPolicy, causal_lm
from llmac.models.value_model import ValueModel
from llmac.runtime.context import Runtime

from .making import CONFIG, bench, live, rollouts_of, rows, trajectory


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def critic(runtime, *, fresh=True, tokens=1000, **config):
    settings = ValueHeadConfig(**{"lr": 3e-3} | config)
    return live(settings, runtime, fresh=fresh, max_tokens_per_microbatch=tokens)


ROWS = rows()


def test_explained_variance_is_zero_and_not_negative_before_anything_is_learned(runtime):
    rollouts = rollouts_of(ROWS)
    values = critic(runtime).values(rollouts, every_token(rollouts.action_mask))
    # mean reward of the five responses
    assert values.at[rollouts.action_mask].tolist() == pytest.approx([0.4] * 13)
    returns = rollouts.rewards.sum(1, keepdim=True).expand_as(values.at)
    assert float(explained_variance(values.at, returns, rollouts.action_mask)) == pytest.approx(
        0.0, abs=1e-6
    )


def test_values_are_given_only_where_asked_and_bootstrap_only_where_truncated(runtime):
    rows = [trajectory([3, 5, 6], 1.0), trajectory([4, 5], 0.0, Finish.LENGTH)]
    rollouts = rollouts_of(rows)
    starts = torch.tensor([[True, False, True], [True, False, False]])
    values = critic(runtime).values(rollouts, starts)
    assert (values.at != 0).tolist() == starts.tolist()
    assert values.bootstrap.tolist() == pytest.approx([0.0, 0.5])


def test_it_starts_at_the_mean_of_those_that_have_ended(runtime):
    paused = trajectory([3, 5, 6], None, Finish.PAUSED)
    learner = critic(runtime)
    unknown = rollouts_of([paused])
    assert learner.values(unknown, every_token(unknown.action_mask)).at.tolist() == [[0.0] * 3]
    some = rollouts_of([paused, trajectory([4, 5], 1.0), trajectory([4, 6], 0.5)])
    values = learner.values(some, every_token(some.action_mask)).at
    assert values[some.action_mask].tolist() == pytest.approx([0.75] * 7)


def test_micro_batches_do_not_change_values(runtime):
    rollouts = rollouts_of(ROWS)
    starts = every_token(rollouts.action_mask)
    one, many = critic(runtime, fresh=False), critic(runtime, fresh=False, tokens=1)
    for c in (one, many):
        torch.nn.init.ones_(c._model.head.weight)
    torch.testing.assert_close(one.values(rollouts, starts).at, many.values(rollouts, starts).at)


def test_it_learns_that_the_first_token_decides(runtime):
    rollouts = rollouts_of(ROWS)
    starts = every_token(rollouts.action_mask)
    learner = critic(runtime, value_clip=None)
    returns = (
        rollouts.rewards.sum(1, keepdim=True).expand_as(rollouts.rewards) * rollouts.action_mask
    )
    for _ in range(60):
        values = learner.values(rollouts, starts)
        targets = CriticTargets(
            returns=returns, value_mask=rollouts.action_mask, old_values=values.at
        )
        metrics = learner.update(rollouts, targets)
    values = learner.values(rollouts, starts).at
    # Before the first token nothing is known; after it everything is.
    assert values[:, 0].tolist() == pytest.approx([0.4] * 5, abs=0.1)
    assert values[0, 1:3].tolist() == pytest.approx([1.0, 1.0], abs=0.1)
    assert values[4, 1:3].tolist() == pytest.approx([0.0, 0.0], abs=0.1)
    assert metrics["critic/vf_loss"].value < 0.08


@pytest.mark.parametrize(("width", "expected"), [(1.0, 0.405), (2.0, 0.405), (10.0, 0.405)])
def test_the_clip_is_sized_to_the_reward_range(runtime, width, expected):
    # At every scale: old .5, new .9, return 0, clip .2 -> 0.5 · max(.9², .7²) = .405, times width²
    config = ValueHeadConfig(value_clip=0.2, reward_range=(0.0, width))
    assert config.clip == pytest.approx(0.2 * width)
    head = critic(runtime, value_clip=0.2, reward_range=(0.0, width))
    mask = torch.tensor([[True]])
    targets = CriticTargets(
        returns=torch.tensor([[0.0]]), value_mask=mask, old_values=torch.tensor([[0.5 * width]])
    )
    rollouts = rollouts_of([trajectory([3], 0.0)])
    loss = head._loss(torch.full((1, 2, 1, 1), 0.9 * width), rollouts, targets)
    assert float(loss.total) == pytest.approx(expected * width**2)
    assert loss.metrics["critic/vf_clipfrac"].value == 1.0


@pytest.mark.parametrize("detach", [True, False])
def test_a_shared_trunk_moves_only_if_it_is_not_detached(runtime, detach):
    policy = TokenPolicy(AutoModelForCausalLM.from_config(CONFIG), temperature=1.0, chunk_mb=1.0)
    shared = ValueHeadConfig(trunk="shared", detach_trunk=detach, lr=1e-2).build(
        bench(runtime, policy)
    )
    assert shared._model.backbone is causal_lm(policy.model).base_model
    rollouts = rollouts_of(ROWS)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for _ in range(2):  # the head's weights are 0 at first and let no gradient through
        values = shared.values(rollouts, every_token(rollouts.action_mask))
        shared.update(
            rollouts,
            CriticTargets(
                returns=rollouts.rewards, value_mask=rollouts.action_mask, old_values=values.at
            ),
        )
    moved = any(not torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert moved is not detach


def test_a_saved_critic_is_not_started_again(runtime, tmp_path):
    rollouts = rollouts_of(ROWS)
    starts = every_token(rollouts.action_mask)
    trained = critic(runtime)
    trained.values(rollouts, starts)
    torch.nn.init.ones_(trained._model.head.weight)
    expected = trained.values(rollouts, starts).at
    trained.save(tmp_path)
    again = critic(runtime)
    again.load(tmp_path)
    assert torch.equal(again.values(rollouts, starts).at, expected)
    trained.save_pretrained(tmp_path / "model", policy=tmp_path)
    assert torch.equal(
        ValueModel.from_pretrained(tmp_path / "model").head.weight, trained._model.head.weight
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_range": (1.0, 1.0)}, "reward_range must be"),
        ({"value_clip": 0.0}, "value_clip must be positive"),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ValueHeadConfig(**settings)
