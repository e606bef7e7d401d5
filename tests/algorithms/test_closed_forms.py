"""Numbers worked out by hand or recorded from released implementations, reproduced through the
cards."""

import dataclasses

import pytest
import torch

from llmac.algorithms.dapo import overlong_shaping
from llmac.core.segments import every_token
from llmac.core.types import Credit, Values

from .making import card, known, make_rollouts, padded

TWO_GROUPS = {
    "rewards": [1, 1, 0, 0, 1, 0, 0, 0],
    "lengths": [2, 4, 3, 1, 4, 2, 2, 3],
    "group": [3, 3, 3, 3, 8, 8, 8, 8],
}


def first_tokens(name, **fields):
    rollouts = make_rollouts(**TWO_GROUPS)
    return card(name, **fields).credit(rollouts, None).advantages[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        # group 1: mean 1/2, std sqrt(4/4/3) = .577350; group 2: mean 1/4, std 1/2; eps 1e-6
        ("grpo", {}, [0.866024, 0.866024, -0.866024, -0.866024, 1.499997, *[-0.499999] * 3]),
        ("grpo", {"scale_eps": 1e-4}, [0.865875] * 2 + [-0.865875] * 2 + [1.4997, *[-0.4999] * 3]),
        # one std for all eight: mean 3/8, variance (3·25 + 5·9)/64/7 = 0.267857, std .517549
        (
            "grpo",
            {"scale": "batch"},
            [0.966090] * 2 + [-0.966090] * 2 + [1.449135] + [-0.483045] * 3,
        ),
        ("dr_grpo", {}, [0.5, 0.5, -0.5, -0.5, 0.75, -0.25, -0.25, -0.25]),
        ("rloo", {}, [2 / 3, 2 / 3, -2 / 3, -2 / 3, 1.0, -1 / 3, -1 / 3, -1 / 3]),
        (
            "reinforce_pp_baseline",
            {},
            [0.789958] * 2 + [-1.220844] * 2 + [1.292658] + [-0.718143] * 3,
        ),
        ("reinforce_pp", {}, [1.023533] * 2 + [-0.930484] * 2 + [1.023533] + [-0.930484] * 3),
    ],
)
def test_advantages_of_two_small_groups(name, fields, expected):
    assert first_tokens(name, **fields) == pytest.approx(expected, abs=2e-6)


OLD = [[0.0, 0.0], [0.0, 0.0, 0.0]]
NEW = [[0.3, -0.1], [0.5, -0.4, 0.2]]


def loss_and_gradient(algorithm):
    rollouts = known(old=OLD, rewards=[1, -1])
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    credit = Credit(advantages=advantages, policy_mask=rollouts.action_mask)
    logprobs = padded(NEW).requires_grad_()
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    value = loss.total / loss.weight
    value.backward()
    return value.item(), logprobs.grad


@pytest.mark.parametrize(
    ("aggregation", "length_limit", "expected"),
    [
        # token losses -1.28, -.904837 | 1.648721, .8, 1.221403
        ("token_mean", 8, 0.297057),
        ("sequence_mean_token_sum", 8, 0.742643),
        ("sequence_mean_token_mean", 8, 0.065478),
        ("sequence_mean_token_sum_norm", 3, 0.247548),
        ("sequence_mean_token_sum_norm", 8, 0.092830),
    ],
)
def test_clipped_loss_of_five_tokens_under_each_average(aggregation, length_limit, expected):
    algorithm = card("grpo", clip_high=0.28, dual_clip=3.0, aggregation=aggregation)
    rollouts = known(old=OLD, rewards=[1, -1], length_limit=length_limit)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    credit = Credit(advantages=advantages, policy_mask=rollouts.action_mask)
    loss = algorithm.policy_loss(padded(NEW), rollouts, credit)
    assert (loss.total / loss.weight).item() == pytest.approx(expected, abs=1e-6)


def test_clipped_tokens_have_no_gradient():
    _, gradient = loss_and_gradient(card("dapo", dual_clip=3.0))
    expected = padded([[0.0, -0.180967], [0.329744, 0.0, 0.244281]])
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_gspo_moves_a_response_as_a_whole():
    loss, gradient = loss_and_gradient(card("gspo", clip_low=0.2, clip_high=0.28))
    assert loss == pytest.approx(0.0, abs=1e-9)  # both ratios are exp(.1), advantages +1 and -1
    expected = padded([[-0.276293] * 2, [0.184195] * 3])
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_gspo_clips_a_response_as_a_whole():
    loss, gradient = loss_and_gradient(card("gspo"))
    assert loss == pytest.approx((-1.0004 + 1.105171) / 2, abs=1e-6)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        ({"cap_low": 0.8, "cap_high": 1.28}, 0.054153),  # verl's .2/.28
        ({"cap_high": 5.0}, 0.097208),  # TRL
        ({"cap_high": 1.28}, 0.064527),
    ],
)
def test_cispo_caps_are_ratios(caps, expected):
    assert loss_and_gradient(card("cispo", **caps))[0] == pytest.approx(expected, abs=1e-6)


def test_cispo_keeps_the_gradient_of_capped_tokens():
    _, gradient = loss_and_gradient(card("cispo", cap_low=0.8, cap_high=1.28))
    expected = padded([[-0.256, -0.180967], [0.256, 0.16, 0.244281]])
    assert torch.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "fields", "expected"),
    [
        (1, 1.5, {}, -1.2),
        (1, 1.5, {"clip_high": 0.28}, -1.28),
        (1, 0.5, {}, -0.5),
        (-1, 1.5, {}, 1.5),
        (-1, 0.5, {}, 0.8),
        (-1, 5.0, {}, 5.0),
        (-1, 5.0, {"dual_clip": 3.0}, 3.0),
    ],
)
def test_clipped_loss_of_one_token(advantage, ratio, fields, expected):
    rollouts = known(old=[[0.0]], rewards=[0])
    credit = Credit(
        advantages=torch.tensor([[float(advantage)]], dtype=torch.float64),
        policy_mask=rollouts.action_mask,
    )
    logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    loss = card("ppo", **fields).policy_loss(logprobs, rollouts, credit)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(expected)
    assert (logprobs.grad.item() == 0) == (expected in (-1.2, -1.28, 0.8, 3.0))


MISMATCHED = {
    "old": [[-1, -2, -0.5], [-1, -1]],
    "sampler": [[-1.2, -1.5, -0.5], [-2, -1.5]],
    "rewards": [1, 0],
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # token ratios 1.221403, .606531, 1 | 2.718282, 1.648721; products .740818 | 4.481689
        ({"mismatch": "token_truncate"}, [[1.221403, 0.606531, 1], [2, 1.648721]]),
        ({"mismatch": "token_truncate", "mismatch_low": 0.8}, [[1.221403, 0.8, 1], [2, 1.648721]]),
        ({"mismatch": "sequence_truncate"}, [[0.740818] * 3, [2, 2]]),
        ({"mismatch": "token_mask", "mismatch_low": 0.7}, [[1.221403, 0, 1], [0, 1.648721]]),
        ({"mismatch": "sequence_mask", "mismatch_high": 3.0}, [[0.740818] * 3, [0, 0]]),
    ],
)
def test_weights_that_correct_for_the_sampler(fields, expected):
    weights = card("grpo", **fields).credit(known(**MISMATCHED), None).importance
    assert torch.allclose(weights, padded(expected), atol=1e-6)


def test_overlong_shaping_of_the_papers_lengths():
    lengths = torch.tensor([16000, 16384, 18432, 20480, 22528])
    assert overlong_shaping(lengths, 20480, 4096).tolist() == [0, 0, -0.5, -1, -1]


def test_dapo_shapes_scores_before_comparing_siblings():
    rollouts = make_rollouts(
        rewards=[1, 1, 1, 0], lengths=[4, 9, 10, 4], group=[0] * 4, length_limit=10
    )
    scores = card("dapo", overlong_buffer_tokens=4, overlong_penalty=2.0).scores(rollouts)
    assert scores.tolist() == [1, 1 - 2 * 3 / 4, 1 - 2, 0]  # 9 tokens reach 3 of 4 into the buffer
    assert card("dapo", overlong_buffer_tokens=0).scores(rollouts).tolist() == [1, 1, 1, 0]


def test_an_unset_buffer_is_a_fifth_of_the_limit():
    rollouts = make_rollouts(rewards=[1, 1], lengths=[18, 20], group=[0, 0], length_limit=20)
    assert card("dapo").scores(rollouts).tolist() == [1 - 2 / 4, 0]  # 2 of 4 tokens, 4 of 4


def critic_says(rollouts, at, bootstrap=0.0):
    return Values(
        at=padded([at]),
        starts=every_token(rollouts.action_mask),
        bootstrap=torch.tensor([bootstrap], dtype=torch.float64),
    )


def test_ppo_whitens_what_gae_gives():
    rollouts = known(old=[[-1.0] * 3], rewards=[1])
    values = critic_says(rollouts, [0.2, 0.5, 0.8])
    raw = card("ppo", lam=0.95, whiten_advantages=False).credit(rollouts, values)
    assert raw.advantages[0].tolist() == pytest.approx([0.7655, 0.49, 0.2])
    white = card("ppo", lam=0.95).credit(rollouts, values)
    assert white.advantages[0].tolist() == pytest.approx([0.991344, 0.017092, -1.008436], abs=1e-6)
    for credit in (raw, white):
        assert credit.critic_targets.returns[0].tolist() == pytest.approx([0.9655, 0.99, 1.0])


def test_critic_lam_changes_the_targets_and_not_the_advantages():
    rollouts = known(old=[[-1.0] * 3], rewards=[1])
    algorithm = card("ppo", lam=0.95, critic_lam=1.0, whiten_advantages=False)
    credit = algorithm.credit(rollouts, critic_says(rollouts, [0.2, 0.5, 0.8]))
    assert credit.advantages[0].tolist() == pytest.approx([0.7655, 0.49, 0.2])
    assert credit.critic_targets.returns[0].tolist() == pytest.approx([1, 1, 1])


def test_ppo_skips_injected_tokens():
    rollouts = known(old=[[-1, 0, -1, -1]], rewards=[1], injected=[(0, 1)])
    algorithm = card("ppo", lam=0.95, whiten_advantages=False)
    credit = algorithm.credit(rollouts, critic_says(rollouts, [0.2, 9.9, 0.5, 0.8]))
    assert credit.advantages[0].tolist() == pytest.approx([0.7655, 0, 0.49, 0.2])
    assert credit.critic_targets.value_mask[0].tolist() == [True, False, True, True]


def test_ppo_pays_for_leaving_the_reference_token_by_token():
    rollouts = known(old=[[-1, -0.5, -0.2]], ref=[[-1.2, -0.4, -0.3]], rewards=[1])
    algorithm = card("ppo", lam=0.95, kl_coef=0.05, whiten_advantages=False)
    credit = algorithm.credit(rollouts, critic_says(rollouts, [0.1, 0.2, 0.3]))
    assert algorithm.shaped_rewards(rollouts)[0].tolist() == pytest.approx([-0.01, 0.005, 0.995])
    assert credit.advantages[0].tolist() == pytest.approx([0.816987, 0.76525, 0.695], abs=1e-6)
    returns = credit.critic_targets.returns[0].tolist()
    assert returns == pytest.approx([0.916987, 0.96525, 0.995], abs=1e-6)


def test_a_truncated_response_bootstraps_from_the_critic_only_when_asked():
    rollouts = known(old=[[-1.0, -1.0]], rewards=[0], truncated=[0])
    values = critic_says(rollouts, [0.25, 0.5], bootstrap=0.75)
    terminal = card("ppo", whiten_advantages=False).credit(rollouts, values)
    assert terminal.advantages[0].tolist() == [-0.25, -0.5]  # 0 - V
    bootstrap = card("ppo", whiten_advantages=False, on_truncation="bootstrap")
    credit = bootstrap.credit(rollouts, values)
    assert credit.advantages[0].tolist() == [0.5, 0.25]  # V(s_T) - V
    assert credit.critic_targets.returns[0].tolist() == [0.75, 0.75]


def test_the_kl_of_a_response_is_part_of_its_score_in_rloo():
    old, ref = [[-1, -0.5], [-1, -1]], [[-1.2, -0.4], [-1, -1]]
    rollouts = known(old=old, ref=ref, rewards=[1, 0])
    # k1 of row 0: (.2) + (-.1) = .1, so scores are 1 - .5·.1 = .95 and 0; siblings are 2
    advantages = card("rloo", kl_coef=0.5).credit(rollouts, None).advantages
    assert advantages[:, 0].tolist() == pytest.approx([0.95, -0.95])


def test_the_kl_in_the_loss_is_added_after_the_samplers_weight():
    rollouts = known(
        old=[[0.0], [0.0]], ref=[[-0.5], [0.0]], sampler=[[-0.5], [0.0]], rewards=[1, 0]
    )
    algorithm = card("dr_grpo", kl_coef=2.0, mismatch="token_truncate")
    rollouts = dataclasses.replace(rollouts, length_limit=1)
    credit = algorithm.credit(rollouts, None)
    loss = algorithm.policy_loss(torch.zeros(2, 1, dtype=torch.float64), rollouts, credit)
    # policy: exp(.5)·(-.5) + .5; KL: k3(d = .5) = exp(-.5) - 1 + .5 = .106531, times 2
    assert loss.total.item() == pytest.approx(-0.5 * 1.648721 + 0.5 + 2 * 0.106531, abs=1e-5)
