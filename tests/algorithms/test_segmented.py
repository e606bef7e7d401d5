"""Fields that choose where values are asked, in every card that has them."""

import dataclasses

import pytest
import torch

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.segmented import Segmented
from llmac.core.segments import (
    after_ends,
    at_most,
    ends_in_doubt,
    every_n,
    every_token,
    low_probability,
    response_start,
)
from llmac.core.types import Values

from .making import card, card_class, lines, make_rollouts, make_values, ragged, segments_of

CARDS = [name for name in ALGORITHMS if issubclass(card_class(name), Segmented)]


def test_cards_with_a_critic_of_states_may_be_cut():
    assert {"ppo", "vapo", "a2c", "vineppo", "spo_chain"} <= set(CARDS)
    assert card("ppo").segmenter == "every_token"
    assert card("spo_chain").segmenter == "low_probability"
    assert card("vineppo").segmenter == "delimiter"


@pytest.mark.parametrize("name", CARDS)
def test_each_segmenter_is_the_one_of_its_name(name, rollouts):
    mask, old = rollouts.action_mask, rollouts.old_logprobs
    doubtful = low_probability(old, mask, threshold=0.4, interval=2, first=name != "spo_chain")
    expected = {
        ("every_token",): every_token(mask),
        ("every_n", "segment_tokens", 3): every_n(mask, 3),
        ("low_probability", "cut_below", 0.4, "cut_interval", 2): doubtful,
        ("response_start",): response_start(mask),
        ("after_doubt", "cut_below", 0.4): after_ends(
            ends_in_doubt(old, mask, threshold=0.4), mask
        ),
        ("every_token", "max_segments", 2): at_most(every_token(mask), 2),
    }
    for (segmenter, *others), starts in expected.items():
        fields = {"max_segments": None} if segmenter != "response_start" else {}
        fields |= dict(zip(others[::2], others[1::2], strict=True))
        algorithm = card(name, segmenter=segmenter, **fields)
        assert not algorithm.reads_text
        assert torch.equal(algorithm.segments(rollouts), starts)


@pytest.mark.parametrize("name", CARDS)
def test_a_delimiter_is_looked_for_in_the_text_of_the_response(name):
    # Token i is "i. ", or a line "i\n" where i % 3 == 2; row 0 has tokens 0 ... 6, row 1 only 0, 1.
    rollouts = make_rollouts(rewards=[1, 0], lengths=[7, 2], group=[0, 0], injected=[(0, 2)])
    algorithm = card(name, segmenter="delimiter")
    assert algorithm.reads_text
    starts = algorithm.segments(rollouts, decode=lines)
    # The line that ends with token 2 was not sampled.
    assert [row.nonzero().flatten().tolist() for row in starts] == [[0, 6], [0]]
    by_regex = card(name, segmenter="delimiter", delimiter=r"4\. ").segments(rollouts, decode=lines)
    assert [row.nonzero().flatten().tolist() for row in by_regex] == [[0, 5], [0]]
    with pytest.raises(ValueError, match="got no decode"):
        algorithm.segments(rollouts)


@pytest.mark.parametrize("name", [n for n in CARDS if n != "imitation"])  # advantages are weights
def test_tokens_of_a_segment_share_what_the_segment_changed(name):
    rollouts = make_rollouts(rewards=[1, 0], lengths=[7, 3], group=[0, 0])
    algorithm = card(
        name,
        segmenter="every_n",
        segment_tokens=3,
        lam=0.0,
        kl_coef=0.0,
        **({"lam_rule": "fixed"} if name == "vapo" else {}),
        **(
            {"whiten": "none", "train_below": None}
            if name == "spo_chain"
            else {"whiten_advantages": False}
        ),
        **({"center_advantages": False} if name == "genac" else {}),
    )
    values = dataclasses.replace(make_values(rollouts), starts=algorithm.segments(rollouts))
    credit = algorithm.credit(rollouts, values)
    v = values.at
    expected = [v[0, 3] - v[0, 0]] * 3 + [v[0, 6] - v[0, 3]] * 3 + [1 - v[0, 6]]
    assert torch.allclose(credit.advantages[0], torch.stack(expected))
    assert torch.allclose(credit.advantages[1, :3], -v[1, 0])
    assert credit.metrics["rollout/segments"].value == 2
    assert credit.metrics["rollout/uncut_responses"].value == 0.5


def test_rows_that_a_critic_sampled_are_not_counted_as_cut():
    rollouts = make_rollouts(rewards=[1, 0], lengths=[4, 3], group=[0, 0])
    offered = dataclasses.replace(rollouts.trajectories[1], value_span=(0.5, 0.0), fresh_from=2)
    rollouts = dataclasses.replace(rollouts, trajectories=(rollouts.trajectories[0], offered))
    credit = card("ppo").credit(rollouts, make_values(rollouts))
    assert credit.metrics["rollout/segments"].value == 4


def test_a_critic_with_a_head_learns_at_the_starts_of_segments_only(rollouts):
    algorithm = card("ppo", segmenter="every_n", segment_tokens=3)
    starts = segments_of(algorithm, rollouts)
    everywhere = make_values(rollouts)
    values = Values(at=everywhere.at, starts=starts, bootstrap=everywhere.bootstrap)
    assert torch.equal(algorithm.credit(rollouts, values).critic_targets.value_mask, starts)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"segmenter": "every_n", "segment_tokens": 0},
            "segment_tokens of PPO must be at least 1, and it is 0",
        ),
        ({"segment_tokens": 5}, "segment_tokens of PPO .* no effect; set segmenter to every_n"),
        ({"cut_below": 0.5}, "cut_below of PPO .* no effect; set segmenter to low_probability"),
        ({"cut_interval": 2}, "cut_interval of PPO .* no effect"),
        ({"delimiter": "sentence"}, "delimiter of PPO .* no effect; set segmenter to delimiter"),
        ({"segmenter": "low_probability", "cut_below": 1.5}, "cut_below of PPO must be in"),
        ({"segmenter": "low_probability", "cut_interval": 0}, "cut_interval of PPO must be at"),
        ({"segmenter": "delimiter", "delimiter": "("}, "delimiter of PPO: .*found '\\('"),
        ({"segmenter": "delimiter", "delimiter": ""}, "delimiter of PPO: .* matches nothing"),
        ({"max_segments": 0}, "max_segments of PPO must be None, or at least 1"),
        (
            {"segmenter": "response_start", "max_segments": 3},
            "max_segments of PPO .* no effect; choose another segmenter",
        ),
    ],
)
def test_segments_that_cannot_be_cut_are_refused_by_name(fields, says):
    with pytest.raises(ValueError, match=says):
        card("ppo", **fields)


def test_a_response_without_tokens_is_in_no_segment():
    for segmenter in ("every_token", "every_n", "low_probability", "delimiter", "response_start"):
        starts = segments_of(card("ppo", segmenter=segmenter), ragged())
        assert not starts[10].any()
