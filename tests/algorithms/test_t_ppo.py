"""T-PPO: the policy learns from what is new, the critic from what has ended."""

import dataclasses

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.protocols import SamplingParams
from llmac.core.types import Finish, Rollouts, Values
from llmac.core.windowed import Windowed

from .making import card, entropy_of, known, make_values, moved, padded, ragged
from .toy_world.world import LIMIT, Prompts, TableEngine, score, train

RAW = {"lam": 0.95}
AS_PPO = {"critic_lam": 1.0, "whiten_advantages": False}
"""What the card says otherwise than PPO's where nothing is paused."""


def with_trajectories(rollouts: Rollouts, changes) -> Rollouts:
    """The same rows, with the fields of `changes[row]` in their trajectories; paused ones pay nothing."""
    trajectories = tuple(
        dataclasses.replace(t, **changes.get(row, {}))
        for row, t in enumerate(rollouts.trajectories)
    )
    paused = torch.tensor([t.finish is Finish.PAUSED for t in trajectories])
    return dataclasses.replace(
        rollouts,
        trajectories=trajectories,
        rewards=rollouts.rewards.masked_fill(paused[:, None], 0.0),
        truncated=torch.tensor([t.finish is not Finish.STOP for t in trajectories]),
    )


def goes_on(fresh_from=0):
    return {"finish": Finish.PAUSED, "reward": None, "fresh_from": fresh_from}


def one_row(values, changes=None, *, reward=0.0, after=0.0):
    """A response with the given values, and what the card says of it; `after` is V(s_T)."""
    rollouts = with_trajectories(
        known(old=[[0.0] * len(values)], rewards=[reward]), {0: changes or {}}
    )
    return rollouts, Values(
        at=padded([values]),
        starts=rollouts.action_mask.clone(),
        bootstrap=torch.tensor([after], dtype=torch.float64),
    )


def windows(rollouts: Rollouts) -> Rollouts:
    """Rows that ended and rows that go on, new ones and some from earlier steps."""
    return with_trajectories(
        rollouts,
        {
            0: {"fresh_from": 2},
            1: goes_on(5),
            3: {"fresh_from": 3},
            4: {"fresh_from": 6},  # cut at the limit
            6: goes_on(0),
            9: goes_on(4),
        },
    )


def is_row(tensor, values):
    return torch.allclose(tensor, torch.tensor([values], dtype=tensor.dtype), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # δ = .1, .1, and 0 where V(s_3) = V(s_2) is assumed; λ = .95
        ({}, [0.195, 0.1, 0.0]),
        # V(s_3) = .7: δ = .1, .1, .1
        ({"paused_value": "critic"}, [0.28525, 0.195, 0.1]),
        ({"gamma": 0.99}, [0.1781, 0.088357, -0.006]),
    ],
)
def test_a_response_that_goes_on_bootstraps_from_a_value(fields, expected):
    rollouts, values = one_row([0.4, 0.5, 0.6], goes_on(), after=0.7)
    assert is_row(card("t_ppo", **RAW, **fields).credit(rollouts, values).advantages, expected)


def test_taking_the_end_of_a_window_for_the_end_of_the_response_would_punish_every_token():
    rollouts, values = one_row([0.4, 0.5, 0.6], after=0.7)
    assert is_row(card("t_ppo", **RAW).credit(rollouts, values).advantages, [-0.3465, -0.47, -0.6])


def test_a_response_of_two_windows_is_learned_from_in_two_steps():
    # V = .4 .5 .6 .7 .9, R = 1, window 3
    algorithm = card("t_ppo", **RAW)
    first = algorithm.credit(*one_row([0.4, 0.5, 0.6], goes_on(), after=0.7))
    second = algorithm.credit(*one_row([0.4, 0.5, 0.6, 0.7, 0.9], {"fresh_from": 3}, reward=1.0))
    assert is_row(first.advantages, [0.195, 0.1, 0.0])
    assert is_row(second.advantages, [0.0, 0.0, 0.0, 0.295, 0.1])
    assert first.policy_mask.tolist() == [[True, True, True]]
    assert second.policy_mask.tolist() == [[False, False, False, True, True]]

    assert not first.critic_targets.value_mask.any()
    assert second.critic_targets.value_mask.all()
    assert is_row(second.critic_targets.returns, [1.0, 1.0, 1.0, 1.0, 1.0])
    targets = second.critic_targets
    half_squared_error = 0.5 * (targets.old_values - targets.returns).square().mean()
    assert half_squared_error.item() == pytest.approx(0.087)

    # In one window the reward reaches the first three tokens as well.
    whole = algorithm.credit(*one_row([0.4, 0.5, 0.6, 0.7, 0.9], reward=1.0))
    assert is_row(whole.advantages, [0.538176, 0.461237, 0.38025, 0.295, 0.1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lam": 0.95, "whiten_advantages": True},
        {"on_truncation": "bootstrap", "gamma": 0.9},
        {"mask_truncated": True, "kl_coef": 0.1},
        {"lam_rule": "length", "critic_lam": None, "lam_alpha": 0.5},
        {"off_policy": "vtrace"},
    ],
)
@pytest.mark.parametrize("paused_value", ["assumed", "critic"])
def test_where_nothing_is_paused_and_all_is_fresh_it_is_ppo(fields, paused_value, rollouts):
    values = make_values(rollouts)
    ours = card("t_ppo", **fields, paused_value=paused_value).credit(rollouts, values)
    theirs = card("ppo", **{**AS_PPO, **fields}).credit(rollouts, values)
    assert torch.equal(ours.advantages, theirs.advantages)
    assert torch.equal(ours.policy_mask, theirs.policy_mask)
    for field in ("returns", "value_mask", "old_values"):
        assert torch.equal(
            getattr(ours.critic_targets, field), getattr(theirs.critic_targets, field)
        )
    assert {n: m.value for n, m in ours.metrics.items()} == {
        n: m.value for n, m in theirs.metrics.items()
    }


def test_a_run_with_a_window_for_the_longest_response_is_a_run_of_ppo():
    ours = train(card("t_ppo", window_tokens=LIMIT), steps=3)
    assert ours == train(card("ppo", **AS_PPO), steps=3)
    assert ours != train(card("t_ppo", window_tokens=LIMIT - 1), steps=3)


@pytest.mark.parametrize("paused_value", ["assumed", "critic"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_earlier_windows_do_not_touch_the_advantages_of_fresh_tokens(paused_value, gamma):
    algorithm = card("t_ppo", lam=0.9, gamma=gamma, paused_value=paused_value)  # fmt: skip
    rollouts = windows(ragged())
    values = make_values(rollouts)
    whole = algorithm.credit(rollouts, values)
    for row, trajectory in enumerate(rollouts.trajectories):
        first, last = trajectory.fresh_from, len(trajectory.response_ids)
        if first == last:
            continue
        # The row as if its response had begun with its first fresh token.
        new = slice(first, last)
        alone = dataclasses.replace(
            trajectory,
            response_ids=trajectory.response_ids[new],
            action_mask=trajectory.action_mask[new],
            sampler_logprobs=trajectory.sampler_logprobs[new],
            fresh_from=0,
        )
        index = torch.tensor([row])
        cut = dataclasses.replace(
            rollouts.rows(index),
            trajectories=(alone,),
            **{
                field: getattr(rollouts, field)[index, new]
                for field in (
                    "response_ids",
                    "action_mask",
                    "rewards",
                    "sampler_logprobs",
                    "old_logprobs",
                    "ref_logprobs",
                )
            },
        )
        some = Values(
            at=values.at[index, new],
            starts=values.starts[index, new],
            bootstrap=values.bootstrap[index],
        )
        assert torch.allclose(algorithm.credit(cut, some).advantages, whole.advantages[index, new])


def test_the_policy_learns_from_fresh_tokens_and_the_critic_from_what_has_ended():
    rollouts = windows(ragged())
    algorithm = card("t_ppo", whiten_advantages=True)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    for row, t in enumerate(rollouts.trajectories):
        sampled = [row_mask and i >= t.fresh_from for i, row_mask in enumerate(t.action_mask)]
        width = len(sampled)
        assert credit.policy_mask[row, :width].tolist() == sampled
        taught = [mask and t.finish is not Finish.PAUSED for mask in t.action_mask]
        assert credit.critic_targets.value_mask[row, :width].tolist() == taught
    learned = credit.advantages[credit.policy_mask]
    assert learned.mean().item() == pytest.approx(0, abs=1e-9)
    assert learned.var().item() == pytest.approx(1, abs=1e-6)

    logprobs = moved(rollouts)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert (gradient[~credit.policy_mask] == 0).all()
    assert loss.weight == credit.policy_mask.sum()


def test_masked_truncation_leaves_out_what_the_limit_has_cut_and_not_what_is_paused():
    rollouts = windows(ragged())
    values = make_values(rollouts)
    kept = card("t_ppo").credit(rollouts, values)
    masked = card("t_ppo", mask_truncated=True).credit(rollouts, values)
    cut = torch.arange(12) == 4
    for mask in ("policy_mask", "value_mask"):
        before, after = (
            getattr(c if mask == "policy_mask" else c.critic_targets, mask) for c in (kept, masked)
        )
        assert before[cut].any()
        assert not after[cut].any()
        assert torch.equal(after[~cut], before[~cut])
    assert masked.policy_mask[6].any()


def test_metrics_speak_of_the_tokens_they_are_true_of():
    rollouts = windows(ragged())
    values = make_values(rollouts)
    metrics = card("t_ppo", **RAW).credit(rollouts, values).metrics
    paused, fresh = rollouts.paused, rollouts.fresh
    # Log-probs of earlier windows are of other weights: whatever they are, the gap is that of now.
    sampler_logprobs = torch.where(fresh, rollouts.sampler_logprobs, -9.0)
    old = dataclasses.replace(rollouts, sampler_logprobs=sampler_logprobs)
    again = card("t_ppo", **RAW).credit(old, values).metrics
    assert {n: m.value for n, m in again.items()} == {n: m.value for n, m in metrics.items()}
    # Outcomes are those of finished responses, whatever stands at the others.
    ended = rollouts.action_mask & fresh & ~paused[:, None]
    named = [metrics[f"critic/advantages/{name}/mean"] for name in ("good", "bad")]
    assert sum(m.weight for m in named) == ended.sum()
    at = values.at[rollouts.action_mask & ~paused[:, None]]
    assert metrics["critic/values/mean"].value == pytest.approx(at.mean().item())


def test_a_step_in_which_nothing_has_ended_teaches_the_critic_nothing():
    rollouts = with_trajectories(ragged(), {row: goes_on() for row in range(12)})
    credit = card("t_ppo").credit(rollouts, make_values(rollouts))
    assert not credit.critic_targets.value_mask.any()
    assert credit.policy_mask.equal(rollouts.action_mask)
    assert all(torch.isfinite(torch.tensor(m.value)) for m in credit.metrics.values())


def test_losses_of_micro_batches_of_windows_add_up():
    rollouts, algorithm = windows(ragged()), card("t_ppo", entropy_coef=0.01)
    credit, logprobs = algorithm.credit(rollouts, make_values(rollouts)), moved(windows(ragged()))
    whole = algorithm.policy_loss(logprobs, rollouts, credit, entropy=entropy_of(logprobs))
    total, weight = 0.0, 0.0
    for index in torch.arange(12).split([5, 1, 6]):
        part = rollouts.rows(index)
        width = part.action_mask.shape[1]
        piece = credit.rows(index, width)
        some = logprobs[index, :width]
        loss = algorithm.policy_loss(some, part, piece, entropy=entropy_of(some))
        assert algorithm.loss_weight(part, piece) == loss.weight
        total, weight = total + loss.total.item(), weight + loss.weight.item()
    assert total == pytest.approx(whole.total.item())
    assert weight == whole.weight.item()


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_every_token_of_the_toy_world_is_trained_on_in_exactly_one_step(window):
    algorithm = card("t_ppo", window_tokens=window, paused_value="critic")
    plan = algorithm.plan(prompts_per_step=6, sampling=SamplingParams(max_new_tokens=LIMIT))
    engine, prompts, trained, lengths = TableEngine(), Prompts(), {}, {}
    for step in range(20):
        batch = collate(plan.rollout(engine, prompts, score, seed=step)[0], length_limit=LIMIT)
        rollouts = Rollouts(
            **{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)},
            old_logprobs=batch.sampler_logprobs,
            ref_logprobs=None,
        )
        mask = algorithm.policy_mask(rollouts)
        for row, t in zip(mask, rollouts.trajectories, strict=True):
            places = trained.setdefault(t.group, torch.zeros(LIMIT, dtype=torch.int64))
            places[: len(row)] += row
            lengths[t.group] = len(t.response_ids)
    assert len(lengths) > 20
    for group, length in lengths.items():
        assert trained[group].tolist() == [1] * length + [0] * (LIMIT - length)


@pytest.mark.parametrize(
    "fields",
    [
        {"window_tokens": 1, "paused_value": "critic"},
        {"window_tokens": 3, "paused_value": "critic"},
        {"lam": 0.9, "group_size": 4},
        {"whiten_advantages": True},
    ],
)
@pytest.mark.slow
def test_it_learns_with_its_options_on(fields):
    assert train(card("t_ppo", **fields), steps=40, until=0.9)[-1] >= 0.9


def test_the_plan_has_a_place_for_each_response_and_a_third_of_the_limit_as_window():
    sampling = SamplingParams(max_new_tokens=10)
    plan = card("t_ppo", group_size=3).plan(prompts_per_step=4, sampling=sampling)
    assert plan == Windowed(window_tokens=4, responses_per_step=12, sampling=sampling, group_size=3)
    plan = card("t_ppo", window_tokens=10).plan(prompts_per_step=4, sampling=sampling)
    assert plan.window_tokens == plan.length_limit == 10
    for limit, window in ((1, 1), (2, 2), (3, 2), (7, 3)):
        short = SamplingParams(max_new_tokens=limit)
        assert card("t_ppo").plan(prompts_per_step=4, sampling=short).window_tokens == window


def test_windows_that_make_no_sense_are_refused():
    with pytest.raises(
        ValueError, match="window_tokens of TPPO must be None, or at least 1, and it is 0"
    ):
        card("t_ppo", window_tokens=0)
    with pytest.raises(ValueError, match="must be at least 2 when paused_value is assumed"):
        card("t_ppo", window_tokens=1)
    with pytest.raises(
        ValueError, match="at most the length limit of sampling, 10 tokens, and it is 11"
    ):
        card("t_ppo", window_tokens=11).plan(
            prompts_per_step=4, sampling=SamplingParams(max_new_tokens=10)
        )
    with pytest.raises(ValueError, match="TPPO needs the values of a critic"):
        card("t_ppo").credit(ragged(), None)
