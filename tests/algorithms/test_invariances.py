"""What must not matter, for every registered card, plain and with everything switched on."""

import dataclasses
import threading

import pytest
import torch
from torch import Tensor

from llmac.algorithms import ALGORITHMS
from llmac.core.types import Values

from .making import card, entropy_of, make_values, moved, ragged_for, values_for

BUSY = {
    "kl_coef": 0.1,
    "entropy_coef": 0.01,
    "mismatch": "token_truncate",
    "mismatch_high": 1.1,
    "mask_truncated": True,
}
WITHOUT_A_SAMPLER = {"sft", "critique_loop", "critique_filter"}
"""Cards whose term is the likelihood of what others said: no ratio, no advantage."""
NOTHING_TO_CLIP = {"a2c", "pacs", "imitation", "rerank_distill", "coderl", *WITHOUT_A_SAMPLER}
every_card = pytest.mark.parametrize("name", ALGORITHMS)
plain_and_busy = pytest.mark.parametrize("fields", [{}, BUSY], ids=["plain", "busy"])


def busy(name, fields):
    """The card with these fields on, but for those that would have no effect on it."""
    if name in WITHOUT_A_SAMPLER and fields:
        fields = {k: x for k, x in fields.items() if not k.startswith("mismatch")}
        if name == "sft":
            fields["rollouts"] = "stored.parquet"
    return card(name, **fields)


def loss_of(algorithm, logprobs, rollouts, credit):
    return algorithm.policy_loss(logprobs, rollouts, credit, entropy=entropy_of(logprobs))


def rows_of(values: Values | None, index: Tensor) -> Values | None:
    if values is None:
        return None
    return dataclasses.replace(
        values,
        at=values.at[index],
        starts=values.starts[index],
        bootstrap=values.bootstrap[index],
        outcome_chances=values.outcome_chances[index],
    )


@every_card
@plain_and_busy
def test_permuted_rows_have_permuted_credit(name, fields, rollouts):
    algorithm = busy(name, fields)
    order = torch.tensor([7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6])
    values = values_for(algorithm, rollouts)
    straight = algorithm.credit(rollouts, values)
    shuffled = algorithm.credit(rollouts.rows(order), rows_of(values, order))
    assert torch.allclose(shuffled.advantages, straight.advantages[order])
    assert torch.equal(shuffled.policy_mask, straight.policy_mask[order])
    if straight.critic_targets:
        assert torch.allclose(
            shuffled.critic_targets.returns, straight.critic_targets.returns[order]
        )


@every_card
@plain_and_busy
def test_padding_changes_neither_loss_nor_gradient(name, fields, rollouts):
    algorithm = busy(name, fields)
    values = values_for(algorithm, rollouts)
    logprobs = moved(rollouts)
    loss = loss_of(algorithm, logprobs, rollouts, algorithm.credit(rollouts, values))
    (gradient,) = torch.autograd.grad(loss.total, logprobs)

    def widen(x: Tensor, fill: float | bool) -> Tensor:
        return torch.cat([x, torch.full((len(x), 3), fill, dtype=x.dtype)], dim=1)

    wide = dataclasses.replace(
        rollouts,
        response_ids=widen(rollouts.response_ids, 0),
        action_mask=widen(rollouts.action_mask, False),
        rewards=widen(rollouts.rewards, 0.0),
        **{
            field: torch.where(
                widen(rollouts.action_mask, False), widen(getattr(rollouts, field), 0.0), -77.0
            )
            for field in ("sampler_logprobs", "old_logprobs", "ref_logprobs")
        },
    )
    if values:
        values = Values(
            at=widen(values.at, 55.0),
            starts=wide.action_mask,
            bootstrap=values.bootstrap,
            outcome_chances=widen(values.outcome_chances, 55.0),
        )
    garbage = torch.where(
        wide.action_mask, widen(logprobs.detach(), 0.0), torch.nan
    ).requires_grad_()
    entropy = entropy_of(garbage.masked_fill(~wide.action_mask, 0.0))
    credit = algorithm.credit(wide, values)
    padded = algorithm.policy_loss(garbage, wide, credit, entropy=entropy)
    (padded_gradient,) = torch.autograd.grad(padded.total, garbage)
    assert torch.allclose(padded.total, loss.total)
    assert torch.equal(padded.weight, loss.weight)
    width = rollouts.action_mask.shape[1]
    assert torch.allclose(padded_gradient[:, :width], gradient)  # 0, not NaN, at what is masked


@every_card
@plain_and_busy
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [3, 3, 6]])
def test_losses_of_micro_batches_add_up_to_the_loss_of_all(name, fields, sizes, rollouts):
    algorithm = busy(name, fields)
    credit = algorithm.credit(rollouts, values_for(algorithm, rollouts))
    logprobs = moved(rollouts)
    whole = loss_of(algorithm, logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(whole.total, logprobs)

    total, weight, announced = 0.0, 0.0, 0.0
    for index in torch.arange(12).split(sizes):
        part = rollouts.rows(index)
        width = part.action_mask.shape[1]
        piece = credit.rows(index, width)
        loss = loss_of(algorithm, logprobs[index, :width], part, piece)
        total, weight = total + loss.total, weight + loss.weight.item()
        announced += algorithm.loss_weight(part, piece).item()
    (sum_of_gradients,) = torch.autograd.grad(total, logprobs)
    assert torch.allclose(total, whole.total)
    assert torch.allclose(sum_of_gradients, gradient)
    assert (
        weight == announced == whole.weight.item() == algorithm.loss_weight(rollouts, credit).item()
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, fields) for name in ALGORITHMS for fields in ({}, BUSY)]
    + [(name, {"scale": "batch"}) for name in ("grpo", "cispo", "tempo")],
)
def test_two_ranks_give_the_credit_of_one_process(name, fields, rollouts):
    algorithm = busy(name, fields)
    values = values_for(algorithm, rollouts)
    alone = algorithm.credit(rollouts, values)
    shares = [torch.arange(0, 8), torch.arange(8, 12)]  # a group never leaves its rank
    meeting, offered, credits = threading.Barrier(2), [None, None], [None, None]

    def rank(r: int) -> None:
        def sum_across(x: Tensor) -> Tensor:
            offered[r] = x
            meeting.wait(timeout=10)
            total = offered[0] + offered[1]
            meeting.wait(timeout=10)
            return total

        part = rollouts.rows(shares[r])
        given = rows_of(values, shares[r])
        width = part.action_mask.shape[1]
        if given:
            given = dataclasses.replace(
                given,
                at=given.at[:, :width],
                starts=given.starts[:, :width],
                outcome_chances=given.outcome_chances[:, :width],
            )
        credits[r] = algorithm.credit(part, given, sum_across=sum_across)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for share, credit in zip(shares, credits, strict=True):
        width = credit.advantages.shape[1]
        assert torch.allclose(credit.advantages, alone.advantages[share, :width])
        std = "critic/advantages/std"
        if name in WITHOUT_A_SAMPLER:
            assert torch.equal(credit.likelihood, alone.likelihood[share, :width])
            continue
        assert credit.metrics[std].value == pytest.approx(alone.metrics[std].value)


@every_card
@plain_and_busy
def test_advantages_are_zero_where_the_policy_does_not_learn(name, fields, rollouts):
    algorithm = busy(name, fields)
    credit = algorithm.credit(rollouts, values_for(algorithm, rollouts))
    assert (credit.advantages[~credit.policy_mask] == 0).all()
    assert not (credit.policy_mask & ~rollouts.action_mask).any()


@every_card
def test_a_step_of_truncated_and_masked_responses_is_no_step_and_no_nan(name, rollouts):
    algorithm = busy(name, BUSY)
    cut = dataclasses.replace(rollouts, truncated=torch.ones(12, dtype=torch.bool))
    values = make_values(cut) if algorithm.default_critic else None
    credit = algorithm.credit(cut, values)
    logprobs = moved(cut)
    loss = loss_of(algorithm, logprobs, cut, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert loss.weight == 0
    assert loss.total == 0
    assert (gradient == 0).all()
    assert (credit.advantages == 0).all()
    measured = {**credit.metrics, **loss.metrics}
    assert all(torch.isfinite(torch.tensor(m.value)) for m in measured.values())


@every_card
def test_one_response_of_one_token_is_no_nan(name, rollouts):
    algorithm = card(name)
    one = ragged_for(name).rows(torch.tensor([8, 9] if algorithm.group_size > 1 else [5]))
    one = dataclasses.replace(
        one, action_mask=one.action_mask & (torch.arange(one.action_mask.shape[1]) == 0)
    )
    credit = algorithm.credit(one, values_for(algorithm, one))
    logprobs = moved(one)
    loss = loss_of(algorithm, logprobs, one, credit)
    assert torch.isfinite(credit.advantages).all()
    assert torch.isfinite(loss.total)


@every_card
@plain_and_busy
def test_every_card_reports_what_is_always_watched(name, fields, rollouts):
    algorithm = busy(name, fields)
    credit = algorithm.credit(rollouts, values_for(algorithm, rollouts))
    loss = loss_of(algorithm, moved(rollouts), rollouts, credit)
    always = {
        "actor/pg_loss",
        "actor/ppo_kl",
        "actor/ratio_max",
        "actor/entropy",
    }
    assert always <= set(loss.metrics)
    assert ("actor/pg_clipfrac" in loss.metrics) == (name not in NOTHING_TO_CLIP)
    watched = {"critic/advantages/mean", "critic/advantages/std", "actor/sampler_kl"}
    assert watched <= set(credit.metrics) or name in WITHOUT_A_SAMPLER
    assert ("actor/ref_kl" in {**loss.metrics, **credit.metrics}) == algorithm.uses_reference
    explains = algorithm.default_critic is not None and name != "coderl"
    assert ("critic/vf_explained_var" in credit.metrics) == explains
    assert all(
        not getattr(part, "requires_grad", False)
        for measure in loss.metrics.values()
        for part in dataclasses.astuple(measure)
    )


@every_card
def test_single_precision_is_close_to_double(name):
    algorithm = card(name)
    wide, narrow = ragged_for(name), ragged_for(name, dtype=torch.float32)
    pair = []
    for rollouts in (wide, narrow):
        credit = algorithm.credit(rollouts, values_for(algorithm, rollouts))
        pair.append(loss_of(algorithm, moved(rollouts), rollouts, credit).total.item())
    assert pair[1] == pytest.approx(pair[0], rel=1e-3, abs=1e-3)
