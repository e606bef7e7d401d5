"""Historic bugs of this field that pure functions can have, one test each.

Every test first shows the wrong number the bug gave, so that the example is known to tell them apart, and
then the right one.
"""

import dataclasses
import math

import pytest
import torch

from llmac.core.baselines import group_relative
from llmac.core.collate import collate
from llmac.core.diagnostics import explained_variance, sampler_gap
from llmac.core.importance import importance_weights
from llmac.core.losses import clipped_surrogate, log_ratio
from llmac.core.masking import aggregate, aggregation_weight, masked_mean, masked_var, whiten
from llmac.core.plans import Flat
from llmac.core.protocols import Completion, SamplingParams
from llmac.core.returns import place_outcome_rewards, segment_gae
from llmac.core.types import Finish, Prompt, Trajectory

ENDED = torch.zeros(1)


def test_a_masked_value_does_not_leak_through_gae():
    """Lesson (ROLL 447): the value read at a tool token bootstrapped the action before it."""
    mask = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.2, 9.9, 0.5, 0.8]])
    everywhere = torch.ones_like(mask)
    leaked = segment_gae(rewards, values, everywhere, ENDED, gamma=1.0, lam=0.95)
    assert leaked[0, 0].item() == pytest.approx(1.212225, abs=1e-6)

    advantages = segment_gae(rewards, values, mask, ENDED, gamma=1.0, lam=0.95, action_mask=mask)
    torch.testing.assert_close(advantages, torch.tensor([[0.7655, 0.0, 0.49, 0.2]]))


def test_tool_tokens_do_not_decay_credit():
    """Lesson (verl 2337): zeroing value and reward of tool tokens still discounts once for each."""
    mask = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    zeroed = torch.tensor([[0.2, 0.0, 0.5, 0.8]])
    decayed = segment_gae(rewards, zeroed, torch.ones_like(mask), ENDED, gamma=1.0, lam=0.95)
    assert decayed[0, 0].item() == pytest.approx(0.717225, abs=1e-6)

    advantages = segment_gae(rewards, zeroed, mask, ENDED, gamma=1.0, lam=0.95, action_mask=mask)
    assert advantages[0, 0].item() == pytest.approx(0.7655, abs=1e-6)


def test_a_reward_on_a_masked_last_token_is_not_lost():
    """Lesson (miles 1827): the last token was tool output, and the terminal reward stood on it."""
    mask = torch.tensor([[True, True, False]])
    on_the_last_token = torch.tensor([[0.0, 0.0, 1.0]])
    assert (on_the_last_token * mask).sum().item() == 0.0

    assert place_outcome_rewards(torch.ones(1), mask).tolist() == [[0.0, 1.0, 0.0]]
    for rewards in (on_the_last_token, place_outcome_rewards(torch.ones(1), mask)):
        advantages = segment_gae(
            rewards, torch.zeros(1, 3), mask, ENDED, gamma=1.0, lam=1.0, action_mask=mask
        )
        assert advantages.tolist() == [[1.0, 1.0, 0.0]]


def test_the_reward_does_not_stand_on_the_first_padding_position():
    """Lesson (TRL's PPOTrainer): with λ < 1 one more position means one more decay."""
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]])
    rewards = torch.tensor([[-0.01, 0.005, -0.005, 1.0, 0.0]])
    starts = torch.ones(1, 5, dtype=torch.bool)
    late = segment_gae(rewards, values, starts, ENDED, gamma=1.0, lam=0.95)
    assert late[0, 0].item() == pytest.approx(0.789912, abs=1e-6)

    mask = torch.tensor([[True, True, True, False, False]])
    rewards = torch.tensor([[-0.01, 0.005, -0.005, 0.0, 0.0]])
    rewards = rewards + place_outcome_rewards(torch.ones(1), mask)
    ours = segment_gae(rewards, values, mask, ENDED, gamma=1.0, lam=0.95, action_mask=mask)
    torch.testing.assert_close(
        ours, torch.tensor([[0.816987, 0.76525, 0.695, 0.0, 0.0]]), rtol=0, atol=1e-6
    )


def test_truncated_is_not_terminated():
    """Lesson (older than LLMs): cutting a story short is not its end; its value is not 0."""
    rewards, values = torch.zeros(1, 2), torch.tensor([[0.6, 0.7]])
    starts = torch.ones(1, 2, dtype=torch.bool)
    as_if_ended = segment_gae(rewards, values, starts, ENDED, gamma=1.0, lam=1.0)
    assert (as_if_ended < -0.5).all()

    truncated = segment_gae(rewards, values, starts, torch.tensor([0.75]), gamma=1.0, lam=1.0)
    assert (truncated > 0).all()


def test_explained_variance_is_not_a_mean_of_micro_batches():
    """Lesson (RLinf 1247): a ratio of variances is neither a mean nor a sum of its parts."""
    returns = torch.tensor([[0.0, 0.1], [1.0, 1.1]])
    values = torch.tensor([[0.1, 0.0], [1.1, 1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    parts = [
        explained_variance(values[i : i + 1], returns[i : i + 1], mask[i : i + 1]) for i in (0, 1)
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(-3.0, abs=1e-4)

    # Var(G) = .2525, Var(G - V) = .01
    assert explained_variance(values, returns, mask).item() == pytest.approx(1 - 0.01 / 0.2525)


def test_explained_variance_over_two_ranks_is_that_of_one_process():
    """Lesson (RLinf 1247), across ranks: sums meet before the ratio is taken."""
    generator = torch.Generator().manual_seed(0)
    values, returns = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]] * 3 + [[True] * 3])
    whole = explained_variance(values, returns, mask)

    def partial_sums(rank):
        """What one rank contributes: twice (Σx, n) and then (Σ(x - mean)², n), and at the end the size of it all."""
        sums = []
        for x in (returns - values, returns):
            mean, count = masked_mean(x, mask), mask[rank].sum()
            mine = x[rank]
            sums.append(torch.stack([mine.where(mask[rank], 0.0).sum(), count]))
            squares = (mine - mean).square().where(mask[rank], 0.0).sum()
            sums.append(torch.stack([squares, count]))
        size = (returns[rank].square() + values[rank].square()).where(mask[rank], 0.0).sum()
        return iter([*sums, torch.stack([size, count])])

    here, there = slice(0, 1), slice(1, 4)
    others = partial_sums(there)
    ours = explained_variance(
        values[here], returns[here], mask[here], sum_across=lambda part: part + next(others)
    )
    assert ours.item() == pytest.approx(whole.item())


@pytest.mark.parametrize(
    "how",
    [
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_mean_token_sum_norm",
    ],
)
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_loss_does_not_grow_with_the_number_of_micro_batches(how, parts):
    """Lesson (verl 6957, NeMo-RL 3791, TRL 6024): a mean for each micro-batch, summed, is k losses."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 2, 5, 4, 0, 2])[:, None]

    def gradient(divide_each):
        x = values.clone().requires_grad_()
        denominator = aggregation_weight(mask, how)
        for rows, kept in zip(x.chunk(parts), mask.chunk(parts), strict=True):
            total, weight = aggregate(0.5 * rows.square(), kept, how, horizon=6)
            (total / (weight.clamp(min=1) if divide_each else denominator)).backward()
        return x.grad

    x = values.clone().requires_grad_()
    total, weight = aggregate(0.5 * x.square(), mask, how, horizon=6)
    (total / weight).backward()
    if parts > 1:
        assert gradient(divide_each=True).norm() > 1.3 * x.grad.norm()
    torch.testing.assert_close(gradient(divide_each=False), x.grad)


def test_the_horizon_of_dr_grpo_is_not_the_padded_width():
    """Lesson (verl's default): the width of a micro-batch is an accident of its longest response."""
    loss, mask = torch.ones(1, 4), torch.tensor([[True, True, False, False]])
    by_width = [
        aggregate(loss[:, :width], mask[:, :width], "sequence_mean_token_sum_norm", horizon=width)
        for width in (2, 4)
    ]
    assert by_width[0][0] != by_width[1][0]

    wide = aggregate(loss, mask, "sequence_mean_token_sum_norm", horizon=8)
    narrow = aggregate(loss[:, :2], mask[:, :2], "sequence_mean_token_sum_norm", horizon=8)
    assert wide == narrow == (torch.tensor(0.25), torch.tensor(1.0))


def test_equal_rewards_give_no_advantage_in_float32():
    """Lesson (several): the float32 mean of equal 0.1s is not 0.1, and the rest is divided by eps."""
    noise = max(
        abs(((rewards - rewards.mean()) / (rewards.std() + 1e-9)).max().item())
        for rewards in (
            torch.full((size,), value) for size in range(2, 65) for value in (0.1, 0.3, 0.7)
        )
    )
    assert noise > 0.01

    for size in range(2, 65):
        for value in (0.1, 0.3, 0.7):
            rewards, group = torch.full((size,), value), torch.zeros(size, dtype=torch.long)
            for scale in ("group", "batch", "none"):
                advantages = group_relative(rewards, group, scale=scale, eps=1e-9)
                assert (advantages == 0).all()
            assert (whiten(rewards[:, None], torch.ones(size, 1, dtype=torch.bool)) == 0).all()


def test_truncated_sampling_shows_as_the_kept_mass():
    """Lesson (TRL 6789): top-p renormalises, so π/μ is the kept mass and its mean never is 1."""
    policy = torch.tensor([0.5, 0.395, 0.07, 0.035])
    kept = policy[:2]  # top_p = 0.8 keeps two tokens with mass .895
    sampler = kept / kept.sum()
    drawn = torch.tensor([[0, 0, 1, 0, 1]])
    mask = torch.ones(1, 5, dtype=torch.bool)

    raw = sampler_gap(policy.log()[drawn], policy.log()[drawn], mask)
    assert raw["actor/sampler_ratio_mean"].value == 1.0  # raw log-probs hide the bias

    processed = sampler_gap(policy.log()[drawn], sampler.log()[drawn], mask)
    assert processed["actor/sampler_ratio_mean"].value == pytest.approx(0.895, abs=1e-6)
    weights = importance_weights(
        policy.log()[drawn], sampler.log()[drawn], mask,
        level="token", kind="truncate", low=None, high=2.0,
    )  # fmt: skip
    torch.testing.assert_close(weights, torch.full((1, 5), 0.895))


def test_a_forgotten_temperature_shows_as_a_sampler_gap():
    """Lesson (TRL 4159): logits must be divided by the temperature in the trainer, too."""
    logits, drawn = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[0, 0, 1, 0, 2]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    sampler = (logits / 0.7).log_softmax(0)[drawn]

    forgotten = sampler_gap(logits.log_softmax(0)[drawn], sampler, mask)
    assert forgotten["actor/sampler_kl"].value > 0.01
    divided = sampler_gap((logits / 0.7).log_softmax(0)[drawn], sampler, mask)
    assert divided["actor/sampler_kl"].value == 0.0
    assert divided["actor/sampler_logprob_diff_max"].value == 0.0


def test_whitening_removes_the_mean_when_asked_to_center_and_not_otherwise():
    """Lesson (a port with the condition inverted): "whitened" advantages kept their mean."""
    x, mask = torch.tensor([[4.0, 6.0, 5.0]]), torch.ones(1, 3, dtype=torch.bool)
    inverted = whiten(x, mask, center=False)
    assert masked_mean(inverted, mask).item() == pytest.approx(5.0)

    centred = whiten(x, mask)
    assert masked_mean(centred, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert masked_var(centred, mask).item() == pytest.approx(1.0)
    torch.testing.assert_close(inverted, centred + 5.0)


def one_token(reward, name):
    return Trajectory(
        prompt=Prompt(id=name, token_ids=(1,), source="?"),
        response_ids=(5,),
        action_mask=(True,),
        sampler_logprobs=(-0.5,),
        finish=Finish.STOP,
        group=0,
        reward=reward,
    )


@pytest.mark.parametrize("reward", [math.nan, None])
def test_one_bad_reward_does_not_poison_its_group(reward):
    """Lesson (TRL 5775, ms-swift 8123): one NaN makes every sibling's advantage NaN, silently."""
    poisoned = group_relative(torch.tensor([1.0, math.nan, 0.0]), torch.zeros(3, dtype=torch.long))
    assert poisoned.isnan().all()

    rows = [one_token(1.0, "gsm8k/7"), one_token(reward, "gsm8k/8"), one_token(0.0, "gsm8k/9")]
    with pytest.raises(ValueError, match="gsm8k/8"):
        collate(rows, length_limit=4)


def test_masked_nan_reaches_neither_loss_nor_gradient():
    """Lesson (many): 0 * NaN is NaN, so padding must be selected away, not multiplied."""
    loss = torch.tensor([[1.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    assert (loss * mask).sum().isnan()

    total, weight = aggregate(loss, mask, "token_mean", horizon=2)
    (total / weight).backward()
    assert total.item() == 1.0
    assert loss.grad.tolist() == [[1.0, 0.0]]


def test_an_exploding_ratio_stays_finite():
    """Lesson (TRL 4772): one token the trainer finds e^100 times likelier ends the run in NaN."""
    assert torch.tensor(100.0).exp().isinf()

    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-100.0, -1.0]])
    loss, _ = clipped_surrogate(
        log_ratio(logprobs, old), torch.tensor([[-1.0, -1.0]]), clip_low=0.2, clip_high=0.2
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_dynamic_sampling_ends_even_if_no_group_is_informative():
    """Lesson (verl 7155): waiting for groups that never come looks like a hang."""

    class Engine:
        policy_version = 0

        def generate(self, requests):
            done = Completion(token_ids=(5,), logprobs=(-0.5,), finish=Finish.STOP)
            return [[done] * request.params.n for request in requests]

        def load_weights(self, weights, version):
            raise AssertionError("a plan does not train")

        sleep = wake = close = load_weights

    class Prompts:
        taken = 0

        def take(self, count):
            self.taken += count
            return [Prompt(id="p", token_ids=(1,), source="?")] * count

    def always_wrong(trajectories):
        return [dataclasses.replace(t, reward=0.0) for t in trajectories]

    prompts = Prompts()
    plan = Flat(
        group_size=2,
        prompts_per_step=3,
        sampling=SamplingParams(),
        informative_only=True,
        max_rounds=10,
    )
    trajectories, metrics = plan.rollout(Engine(), prompts, always_wrong, seed=0)
    assert prompts.taken == 30
    assert len(trajectories) == 6
    assert metrics["rollout/groups_filled"].value == 3
