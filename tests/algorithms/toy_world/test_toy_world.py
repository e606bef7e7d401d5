"""Every registered card learns a world whose success rate is known exactly, and unlearns it with
the sign flipped."""

import pytest
import torch

from llmac.algorithms import ALGORITHMS
from llmac.core.protocols import Request, SamplingParams

from ..making import card
from .world import END, PROMPTS, STATES_PER_PROMPT, TableEngine, TablePolicy, reward, states, train

START = 1 / 4 * 3 / 4 * 1 / 4 * (1 / 4 + 3 / 4 * 1 / 4)


def test_a_policy_that_knows_nothing_seldom_succeeds():
    assert TablePolicy().success() == pytest.approx(START)


def test_the_exact_success_rate_is_what_sampling_finds():
    params = SamplingParams(n=4000, max_new_tokens=5, seed=3)
    answers = TableEngine().generate(
        [Request(prompt_ids=(p,), params=params) for p in range(PROMPTS)]
    )
    found = [reward(p, a.token_ids) for p, some in enumerate(answers) for a in some]
    assert sum(found) / len(found) == pytest.approx(START, abs=0.005)
    assert all(a.token_ids[-1] == END or len(a.token_ids) == 5 for some in answers for a in some)


def test_every_state_has_its_own_row():
    every = torch.cartesian_prod(torch.arange(PROMPTS), *[torch.arange(4)] * 5)
    index = states(every[:, 0], every[:, 1:])
    assert len(index.unique()) == index.max() + 1 == PROMPTS * STATES_PER_PROMPT


SPOKEN = {
    "chat": False,
    "critique_prompt": "{question}|{answer}",
    "refine_prompt": "{question}|{answer}{critique}",
}
SMALL = {
    "spo_tree": {"branching": (6, 6), "segment_tokens": 2},
    "critique_rl": {"stage": 2, **SPOKEN},
    "rl4f": SPOKEN,
    "critique_loop": SPOKEN,
    "critique_filter": SPOKEN,
}
"""Settings that are made for longer responses, and how to speak to those who know but digits."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_card_learns_the_toy_world(name):
    history = train(card(name, **SMALL.get(name, {})), steps=40, until=0.9)
    assert history[0] == pytest.approx(START)
    assert history[-1] >= 0.9


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_card_learns_the_toy_world_with_the_sign_of_its_advantages_flipped(name):
    fields = {
        "dapo": {"max_sampling_rounds": 2},  # no informative group is left to wait for
        "vapo": {"likelihood_coef": 0.0},  # right answers would still be imitated
        "rerank_distill": {"top_k": 1},
        **SMALL,
    }
    history = train(card(name, **fields.get(name, {})), steps=12, sign=-1.0)
    # Who chooses by a critic that knows nothing yet is turned away from wrong answers, too.
    assert max(history) < (1.5 if name == "rerank_distill" else 1.2) * START
    assert history[-1] < START / 4


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ppo", {"lam": 0.9, "critic_lam": 1.0, "on_truncation": "bootstrap"}),
        ("ppo", {"kl_coef": 0.01, "group_size": 4}),
        ("ppo", {"lam_rule": "length", "lam_alpha": 0.9, "advantage_clip": 0.5}),
        ("ppo", {"lam_rule": "doubt", "lam": 0.5}),
        ("safe", {"values_at": "every_token", "gate": "asymmetric", "gate_coef": 0.01}),
        ("safe", {"advantage_scale": "running", "gate_coef": 1.0, "phase_window": 5}),
        ("dapo_step", {"step_tokens": 2, "normalize": True, "kl_coef": 0.01}),
        ("dapo_step", {"step_token_ids": (0, 1), "mask_truncated": True}),
        ("rerank_distill", {"score_by": "reward", "temperature": 0.05}),
        ("imitation", {"weight": "exp", "beta": 0.2}),
        ("a2c", {"off_policy": "vtrace", "lam": 0.9, "critic_lam": 1.0}),
        (
            "grpo",
            {
                "kl_coef": 0.01,
                "entropy_coef": 0.001,
                "mismatch": "token_truncate",
                "dual_clip": 3.0,
            },
        ),
        (
            "grpo",
            {
                "scale": "batch",
                "mask_truncated": True,
                "dynamic_sampling": True,
                "max_sampling_rounds": 3,
            },
        ),
        ("rloo", {"kl_coef": 0.01}),
        (
            "spo_tree",
            {
                "branching": (4, 4, 4),
                "segment_tokens": 1,
                "edge_advantage": "grpo",
                "prover_weight": 5.0,
            },
        ),
        (
            "spo_tree",
            {
                "branching": (4, 4, 4),
                "segment_tokens": 1,
                "edge_advantage": "leave_one_out",
                "merge_duplicates": True,
                "replay_steps": 0,
            },
        ),
        ("reinforce_pp_baseline", {"kl_coef": 0.01}),
    ],
)
def test_cards_learn_with_their_options_on(name, fields):
    assert train(card(name, **fields), steps=40, until=0.9)[-1] >= 0.9
