"""TEMPO: GRPO, and where siblings part the change of what their common beginning is worth."""

import dataclasses

import pytest
import torch

from llmac.config.loading import load_recipe
from llmac.core.collate import collate
from llmac.core.returns import segment_gae
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.critics.prefix_tree import PrefixTree
from llmac.errors import ConfigError

from .making import card, make_values, moved, ragged
from .toy_world.world import train


def siblings(responses, rewards, group=None):
    trajectories = [
        Trajectory(
            prompt=Prompt(id=f"p{number}", token_ids=(1,), source="?"),
            response_ids=tuple(ids),
            action_mask=(True,) * len(ids),
            sampler_logprobs=(-0.5,) * len(ids),
            finish=Finish.STOP,
            group=number,
            reward=float(reward),
        )
        for ids, reward, number in zip(
            responses, rewards, group or [0] * len(responses), strict=True
        )
    ]
    batch = collate(trajectories, length_limit=8)
    wide = dataclasses.replace(batch, rewards=batch.rewards.double())
    logprobs = batch.sampler_logprobs.double()
    return dataclasses.replace(
        Rollouts.of(wide, old_logprobs=logprobs), sampler_logprobs=logprobs, ref_logprobs=logprobs
    )


def credit_of(rollouts, **fields):
    algorithm = card("tempo", **fields)
    values = PrefixTree().values(rollouts, algorithm.segments(rollouts))
    return algorithm.credit(rollouts, values)


def advantages(responses, rewards, **fields):
    return credit_of(siblings(responses, rewards), **fields).advantages


BRANCHES = [[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 8, 9]], [1, 0, 1, 0]


def test_a_branch_adds_what_it_changes():
    # r - 1/2, and changes of V: after 1: 2/3 - 1/2; 2: 1/2 - 2/3; 5: 1 - 2/3; 7: -1/2; 3, 4: +-1/2
    expected = torch.tensor(
        [
            [0.666667, 0.333333, 1.0],
            [-0.333333, -0.666667, -1.0],
            [0.666667, 0.833333, 0.5],
            [-1.0, -0.5, -0.5],
        ],
        dtype=torch.float64,
    )
    close = {"rtol": 0, "atol": 3e-6}
    torch.testing.assert_close(advantages(*BRANCHES, scale="none"), expected, **close)
    # the sample standard deviation of 1 0 1 0 is root of 1/3
    torch.testing.assert_close(advantages(*BRANCHES), expected * 3**0.5, **close)
    torch.testing.assert_close(
        advantages(*BRANCHES, scale_eps=0.5), expected / (3**-0.5 + 0.5), **close
    )


def test_where_all_part_at_once_the_first_token_gets_exactly_double():
    found = advantages([[1, 5], [2, 5], [3, 5], [4, 5]], [1, 0, 0, 0], scale="none")
    assert found.tolist() == [[1.5, 0.75], [-0.5, -0.25], [-0.5, -0.25], [-0.5, -0.25]]


def test_what_it_reports_of_values_counts_the_own_outcome_as_explained():
    metrics = credit_of(siblings(*BRANCHES)).metrics
    # V of the rows, halves at first: 1/2 2/3 1/2; the same; 1/2 2/3 1; 1/2 0 0
    assert metrics["critic/values/mean"].value == pytest.approx(6 / 12)
    left = [1 / 2, 1 / 3, 1 / 2, -1 / 2, -2 / 3, -1 / 2, 1 / 2, 1 / 3, 0, -1 / 2, 0, 0]
    spread = sum(x * x for x in left) / 12 - (sum(left) / 12) ** 2
    assert metrics["critic/vf_explained_var"].value == pytest.approx(1 - spread / 0.25)
    # all but the 6 of 1 5 6 and the 8 and 9 of 7 8 9
    assert metrics["critic/branches"].value == 9 / 12


def many():
    random = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 8, (24,), generator=random).tolist()
    responses = [torch.randint(2, 4, (n,), generator=random).tolist() for n in lengths]
    # an outcome is a function of the response, as with any grader that does not throw dice
    rewards = [float(sum(r) % 3) for r in responses]
    return siblings(responses, rewards, [row % 4 for row in range(24)])


def test_changes_add_up_to_what_the_response_earned_above_its_group():
    rollouts = many()
    grpo = card("grpo", scale="none").credit(rollouts, None).advantages
    changes = credit_of(rollouts, scale="none").advantages - grpo
    torch.testing.assert_close(changes.sum(1), grpo[:, 0])
    assert (changes != 0).sum(1).max() > 1


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_it_is_grpo_exactly_where_nothing_branches(scale):
    rollouts = many()
    grpo = card("grpo", scale=scale).credit(rollouts, None).advantages
    tempo = credit_of(rollouts, scale=scale)
    free = PrefixTree().values(rollouts, rollouts.action_mask)
    ahead = torch.cat([free.at[:, 1:], torch.zeros(24, 1, dtype=torch.float64)], dim=1)
    last = rollouts.action_mask & (rollouts.action_mask.flip(1).cumsum(1).flip(1) == 1)
    same = rollouts.action_mask & ~last & (ahead == free.at)
    assert torch.equal(tempo.advantages[same], grpo[same])
    assert 0 < same.sum() < rollouts.action_mask.sum()
    parted = rollouts.action_mask & ~last & ~same
    assert tempo.metrics["critic/branches"].value >= float(
        parted.sum() / rollouts.action_mask.sum()
    )


def test_it_is_grpo_plus_one_step_td_errors_in_the_unit_of_the_group():
    rollouts = ragged()
    values = make_values(rollouts)  # of any critic of states
    plain = card("tempo", scale="none")
    td = segment_gae(
        rollouts.rewards,
        values.at,
        values.starts,
        torch.zeros(12, dtype=torch.float64),
        gamma=1.0,
        lam=0.0,
        action_mask=rollouts.action_mask,
    )
    grpo = card("grpo", scale="none").credit(rollouts, None).advantages
    torch.testing.assert_close(plain.credit(rollouts, values).advantages, grpo + td)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_the_unit_of_both_terms_is_the_same(scale):
    rollouts = many()
    in_reward, in_unit = (credit_of(rollouts, scale=s).advantages for s in ("none", scale))
    grpo = [card("grpo", scale=s).credit(rollouts, None).advantages for s in ("none", scale)]
    moves = grpo[0] != 0
    unit = grpo[0][moves] / grpo[1][moves]
    torch.testing.assert_close(in_unit[moves] * unit, in_reward[moves])


def test_whom_a_response_is_compared_with_does_not_depend_on_the_order_of_rows():
    rollouts = many()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = credit_of(rollouts.rows(order)).advantages
    torch.testing.assert_close(shuffled, credit_of(rollouts).advantages[order])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_outcomes_and_lone_responses_earn_exactly_nothing(scale):
    rollouts = siblings([[1, 2], [1, 3], [4], [5, 6]], [0.1, 0.1, 0.1, 1], [0, 0, 0, 1])
    found = credit_of(rollouts, scale=scale).advantages
    assert (found == 0).all()


def test_a_group_without_spread_is_not_measured_by_epsilon_whatever_the_critic_says():
    rollouts = siblings([[1, 2], [1, 3]], [1, 1])
    values = make_values(rollouts)
    assert (card("tempo").credit(rollouts, values).advantages == 0).all()
    assert (card("tempo", scale="none").credit(rollouts, values).advantages != 0).any()


def test_a_kl_in_the_reward_is_no_branch():
    rollouts = many()
    further = dataclasses.replace(rollouts, ref_logprobs=rollouts.old_logprobs - 0.1)
    fields = {"kl_coef": 0.5, "kl_estimator": "k1", "kl_placement": "reward", "scale": "none"}
    paid = credit_of(further, **fields).advantages - credit_of(rollouts, scale="none").advantages
    grpo = [card("grpo", **f).credit(further, None).advantages for f in (fields, {"scale": "none"})]
    torch.testing.assert_close(paid, grpo[0] - grpo[1])
    assert paid.abs().max() > 0.01


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(ValueError, match=r"TEMPO needs the values of a critic .*prefix_tree"):
        card("tempo").credit(many(), None)
    with pytest.raises(ValueError, match="allocation of TEMPO must be equal: dividing"):
        card("tempo", allocation="mixed")
    with pytest.raises(ValueError, match="group_size of TEMPO must be at least 2"):
        card("tempo", group_size=1)


def test_a_recipe_that_names_tempo_gets_the_prefix_tree(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name: nobody/nothing}\ndata: {name: rows.jsonl}\nreward: reward.py:reward\n"
        "algorithm: tempo\nrun: {steps: 2, output: runs/x}\n"
    )
    assert load_recipe(file).critic.name == "prefix_tree"
    with pytest.raises(ConfigError, match="critic prefix_tree compares siblings"):
        load_recipe(file, ["algorithm={name: ppo}", "critic={name: prefix_tree}"])


def test_truncated_responses_end_as_they_were_rewarded():
    rollouts = siblings(*BRANCHES)
    cut = dataclasses.replace(rollouts, truncated=torch.ones(4, dtype=torch.bool))
    values = make_values(cut)
    found = card("tempo").credit(cut, values).advantages
    other = dataclasses.replace(values, bootstrap=values.bootstrap + 5)
    torch.testing.assert_close(found, card("tempo").credit(cut, other).advantages)


def test_the_gradient_reaches_every_token_of_a_response():
    rollouts = many()
    credit = credit_of(rollouts)
    logprobs = moved(rollouts)
    card("tempo", clip_low=9.0, clip_high=9.0).policy_loss(
        logprobs, rollouts, credit
    ).total.backward()
    assert ((logprobs.grad != 0) == (credit.advantages != 0)).all()


def test_it_learns_the_toy_world_from_its_own_siblings():
    # rows=196 is 28 groups of 7
    history = train(card("tempo"), steps=40, until=0.9, rows=196, critic=PrefixTree())
    assert history[-1] >= 0.9
    flipped = train(card("tempo"), steps=8, rows=196, critic=PrefixTree(), sign=-1.0)
    assert flipped[-1] < history[0] / 2
