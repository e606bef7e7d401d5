"""SPO-tree's card: credit of edges by hand, what it reduces to, and what it refuses."""

import dataclasses

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.protocols import SamplingParams
from llmac.core.spans import span_values
from llmac.core.tree import Tree
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory

from .making import card, moved

PLAIN = {"whiten": "none", "train_below": None, "kl_coef": 0.0}
V = {"": 0.75, "a": 1.0, "b": 0.5}
STD = {"": 0.25, "a": 0.0, "b": 0.5}
LEAVES = {"a": (1.0, 1.0), "b": (0.0, 1.0)}


def edge(before, own, *, parent, std, value, leaf, **changes):
    count = before + own
    fields = {
        "prompt": Prompt(id="p0", token_ids=(1,), source="?"),
        "response_ids": tuple(range(count)),
        "action_mask": (True,) * count,
        "sampler_logprobs": tuple(-0.1 * (t + 1) for t in range(count)),
        "finish": Finish.STOP if leaf else Finish.PAUSED,
        "group": 0,
        "reward": value if leaf else None,
        "fresh_from": before,
        "value_span": (parent, value),
        "sibling_std": std,
    }
    return Trajectory(**{**fields, **changes})


def two_levels():
    """Two children a and b of two tokens; leaves of three tokens, 1 and 1 below a, 0 and 1 below b."""
    upper = [edge(0, 2, parent=V[""], std=STD[""], value=V[n], leaf=False) for n in "ab"]
    lower = [
        edge(2, 3, parent=V[n], std=STD[n], value=r, leaf=True) for n in "ab" for r in LEAVES[n]
    ]
    return [*upper, *lower]


def looked_at(trajectories, *, old=None):
    batch = collate(trajectories, length_limit=8)
    logprobs = batch.sampler_logprobs if old is None else old
    return Rollouts.of(
        batch,
        old_logprobs=torch.where(batch.action_mask, logprobs, 0.0),
        ref_logprobs=torch.where(batch.action_mask, logprobs - 0.1, 0.0),
    )


def credited(trajectories, *, old=None, **fields):
    rollouts = looked_at(trajectories, old=old)
    algorithm = card("spo_tree", **{**PLAIN, **fields})
    values = span_values(rollouts)
    assert torch.equal(values.starts, algorithm.segments(rollouts))
    return algorithm.credit(rollouts, values), rollouts, algorithm


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.25, -0.25, 0, 0, -0.5, 0.5]),
        ({"edge_advantage": "grpo"}, [1, -1, 0, 0, -1, 1]),
        # f(.75) = .99609375, f(.5) = .9375: +.25 + 5·.00390625, -.25 - 5·.05859375, -.5 - 5·.9375 ...
        ({"prover_weight": 5.0}, [0.26953125, -0.54296875, 0, 0, -5.1875, 0.8125]),
        # f(.75) = .9375, f(.5) = .75 of two attempts, and f(1) = 1
        ({"prover_weight": 1.0, "best_of": 2.0}, [0.3125, -0.4375, 0, 0, -1.25, 0.75]),
        # Between -1 and 1, V is a chance of (V + 1)/2: f of .875 and .75 at one attempt
        (
            {"prover_weight": 1.0, "best_of": 1.0, "reward_range": (-1.0, 1.0)},
            [0.375, -0.375, 0, 0, -0.75, 0.75],
        ),
        (
            {"prover_weight": 5.0, "edge_advantage": "grpo"},
            [1.01953125, -1.29296875, 0, 0, -5.6875, 1.3125],
        ),
    ],
)
def test_every_own_token_of_an_edge_has_its_advantage(fields, expected):
    credit, rollouts, _ = credited(two_levels(), **fields)
    own = rollouts.action_mask & rollouts.fresh
    wanted = torch.tensor(expected, dtype=torch.float32)[:, None] * own
    assert torch.allclose(credit.advantages, wanted, atol=1e-6)
    assert torch.equal(credit.policy_mask, own)
    assert credit.critic_targets is None
    assert credit.metrics["critic/values/mean"].value == pytest.approx((2 * 0.75 + 2 + 1) / 6)


def test_tokens_in_no_doubt_are_not_trained_and_the_others_whitened():
    old = torch.full((6, 5), 0.5).log()
    old[:, 1] = old[:, 3] = torch.tensor(0.95).log()
    credit, rollouts, _ = credited(two_levels(), old=old, train_below=0.9, whiten="step")
    own = rollouts.action_mask & rollouts.fresh
    doubtful = own & (old < torch.tensor(0.9).log())
    assert torch.equal(credit.policy_mask, doubtful)
    trained = credit.advantages[doubtful]
    assert trained.mean().item() == pytest.approx(0, abs=1e-6)
    assert trained.std().item() == pytest.approx(1, abs=1e-5)
    # One token of each upper edge, two of each lower: .25, -.25, and twice 0, 0, -.5, .5
    raw = torch.tensor([0.25, -0.25, 0, 0, 0, 0, -0.5, -0.5, 0.5, 0.5])
    assert torch.allclose(trained, raw / raw.std(), atol=1e-5)
    assert credit.advantages[~doubtful].abs().max() == 0


def test_a_token_before_its_edge_is_never_trained():
    credit, rollouts, algorithm = credited(two_levels(), train_below=0.9, kl_coef=0.1)
    logprobs = moved(rollouts)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    prefix = rollouts.action_mask & ~rollouts.fresh
    assert gradient[prefix].abs().max() == 0
    assert gradient[credit.policy_mask].abs().min() > 0


def test_a_leaf_cut_at_the_limit_has_the_reward_it_was_given_and_may_be_left_out():
    rows = two_levels()
    rows[4] = dataclasses.replace(rows[4], finish=Finish.LENGTH)
    credit, rollouts, _ = credited(rows)
    assert credit.advantages[4, 2:].tolist() == [-0.5] * 3
    # Also where a critic says what would have come.
    said = dataclasses.replace(span_values(rollouts), bootstrap=torch.full((6,), 9.0))
    plain = card("spo_tree", **PLAIN).credit(rollouts, said)
    assert torch.equal(plain.advantages[2:], credit.advantages[2:])
    assert plain.advantages[0, 0] == 9 - 0.75
    masked, _, _ = credited(rows, mask_truncated=True)
    left_out = torch.arange(6) == 4
    own = rollouts.action_mask & rollouts.fresh
    assert torch.equal(masked.policy_mask, own & ~left_out[:, None])  # inner edges stay


@pytest.mark.parametrize("fields", [{"whiten": "step"}, {"whiten": "rows", "whiten_rows": 2}])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_row_without_own_tokens_changes_nothing(fields, leaf):
    fields |= {"kl_coef": 0.1, "train_below": 0.9, "edge_advantage": "grpo"}
    nothing = edge(2, 0, parent=0.5, std=0.0, value=0.5, leaf=leaf)
    without, alone, algorithm = credited(two_levels(), **fields)
    credit, rollouts, _ = credited([*two_levels(), nothing], **fields)
    assert not credit.policy_mask[-1].any()
    assert torch.equal(credit.advantages, torch.cat([without.advantages, torch.zeros(1, 5)]))
    assert torch.equal(credit.kl_scale[:-1], without.kl_scale)
    logprobs = moved(rollouts)
    ours = algorithm.policy_loss(logprobs, rollouts, credit)
    theirs = algorithm.policy_loss(logprobs[:6], alone, without)
    assert torch.allclose(ours.total, theirs.total)  # added up in another order
    assert torch.equal(ours.weight, theirs.weight)
    for name, measure in without.metrics.items():
        assert credit.metrics[name].value == pytest.approx(measure.value, nan_ok=True), name
    # A rank that has nothing else.
    lone, rows, _ = credited([nothing], **fields)
    loss = algorithm.policy_loss(moved(rows), rows, lone)
    assert (loss.total.item(), loss.weight.item()) == (0, 0)
    assert not lone.advantages.any()


def test_replayed_edges_count_in_the_loss_and_not_in_the_comparison_of_engine_and_trainer():
    rows = two_levels()
    old = looked_at(rows).old_logprobs - 0.3
    fresh, _, _ = credited(rows, old=old)
    rows = [dataclasses.replace(r, age=i % 2) for i, r in enumerate(rows)]
    credit, rollouts, _ = credited(rows, old=old)
    assert torch.equal(credit.policy_mask, fresh.policy_mask)
    assert fresh.metrics["actor/sampler_logprob_diff_mean"].value == pytest.approx(0.3)
    gap = credit.metrics["actor/sampler_logprob_diff_mean"]
    assert float(gap.weight) == float((rollouts.fresh & rollouts.action_mask)[::2].sum())
    # Inner edges are neither good nor bad: of leaves 1, 1, 0, 1, three tokens each.
    assert float(credit.metrics["critic/advantages/good/mean"].weight) == 9
    assert float(credit.metrics["critic/advantages/bad/mean"].weight) == 3


def test_what_a_segment_starts_with_foretells_some_of_what_it_ends_with():
    credit, _, _ = credited(two_levels())
    starts, ends = torch.tensor([0.75, 0.75, 1, 1, 0.5, 0.5]), torch.tensor([1, 0.5, 1, 1, 0, 1])
    expected = 1 - (ends - starts).var() / ends.var()
    assert credit.metrics["critic/vf_explained_var"].value == pytest.approx(expected.item())


def test_one_level_has_grpos_advantages():
    rewards = (1.0, 1.0, 0.0, 1.0)
    rows = [edge(0, 3, parent=0.75, std=3**0.5 / 4, value=r, leaf=True) for r in rewards]
    credit, _, _ = credited(rows, edge_advantage="grpo")
    by_hand = torch.tensor([0.57735, 0.57735, -1.73205, 0.57735])
    assert torch.allclose(credit.advantages, by_hand[:, None].expand(4, 3), atol=1e-5)
    centred, rollouts, _ = credited(rows)
    flat = card("grpo", scale="none").credit(rollouts, None)
    assert torch.allclose(centred.advantages, flat.advantages)


def test_a_card_says_how_its_trees_grow():
    algorithm = card(
        "spo_tree", branching=(4, 5), edges_per_step=7, keep="all", merge_duplicates=True
    )
    assert algorithm.group_size == 20
    assert card("spo_tree").group_size == 216
    assert algorithm.plan_knows_values
    plan = algorithm.plan(prompts_per_step=3, sampling=SamplingParams(max_new_tokens=64))
    assert plan == Tree(
        branching=(4, 5),
        segment_tokens=30,
        prompts_per_step=3,
        sampling=SamplingParams(max_new_tokens=64),
        keep="all",
        edges_per_step=7,
        edges_per_prompt=32,
        replay_steps=8,
        merge_duplicates=True,
    )


def test_values_and_deviations_that_nobody_knows_are_missed():
    rows = two_levels()
    with pytest.raises(ValueError, match=r"set critic: \{name: tree_mean\}"):
        card("spo_tree").credit(looked_at(rows), None)
    rows[2] = dataclasses.replace(rows[2], sibling_std=None)
    with pytest.raises(ValueError, match="grpo, and 1 rows, the first a response to prompt p0"):
        credited(rows, edge_advantage="grpo")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"branching": ()}, "branching of SPOTree must be one number a level, each at least 1"),
        ({"branching": (6, 0, 6)}, r"each at least 1, and it is \(6, 0, 6\)"),
        (
            {"branching": (6, 1), "edge_advantage": "leave_one_out"},
            "branching of SPOTree must be at least 2 at every level when edge_advantage",
        ),
        ({"segment_tokens": 0}, "segment_tokens of SPOTree must be at least 1"),
        ({"best_of": 0.5}, "best_of of SPOTree must be finite and at least 1"),
        ({"prover_weight": -1.0}, "prover_weight of SPOTree must be finite and at least 0"),
        ({"reward_range": (1.0, 1.0)}, "reward_range of SPOTree must be"),
        ({"best_of": 2.0}, "best_of of SPOTree is 2.0 and would have no effect; set prover_weight"),
        ({"reward_range": (-1.0, 1.0)}, "reward_range of SPOTree .* would have no effect"),
        ({"edges_per_step": 0}, "edges_per_step of SPOTree must be None, or at least 1"),
        ({"edges_per_prompt": 0}, "edges_per_prompt of SPOTree must be None, or at least 1"),
        ({"replay_steps": -1}, "replay_steps of SPOTree must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        card("spo_tree", **fields)


def test_a_level_that_no_response_reaches_is_refused():
    with pytest.raises(
        ValueError, match=r"begin after 8 tokens.*lower segment_tokens to at most 3"
    ):
        card("spo_tree", branching=(2, 2, 2), segment_tokens=4).plan(
            prompts_per_step=1, sampling=SamplingParams(max_new_tokens=8)
        )
