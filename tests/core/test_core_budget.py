"""How many responses each prompt deserves."""

import itertools
import math

import pytest
import torch

from llmac.core.budget import (
    UTILITIES,
    allocate,
    failures_beside_a_success,
    mixed_group,
    route,
)

CARD = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


def worth(budget, chance, utility):
    return float(UTILITIES[utility](budget.double(), chance.double()).sum())


def greedily(chance, total, minimum, utility):
    """Each response to whom it helps most: what the dynamic programming is compared with."""
    budget = torch.full((len(chance),), float(minimum), dtype=torch.float64)
    of = UTILITIES[utility]
    while budget.sum() < total:
        budget[(of(budget + 1, chance) - of(budget, chance)).argmax()] += 1
    return budget


def exhaustively(chance, total, minimum, maximum, utility):
    """The most that any allocation is worth, by looking at all of them."""
    choices = itertools.product(range(minimum, maximum + 1), repeat=len(chance))
    return max(
        worth(torch.tensor(choice), chance, utility) for choice in choices if sum(choice) == total
    )


@pytest.mark.parametrize(
    ("chance", "expected"),
    [
        # B = 1, 2, 4, 8, 16
        (0.05, [0, 0.095, 0.541975, 2.292637, 8.157973]),
        (0.5, [0, 0.5, 1.75, 3.96875, 7.999756]),
        (0.9, [0, 0.18, 0.3996, 0.8, 1.6]),
    ],
)
def test_failures_are_worth_what_the_card_says(chance, expected):
    budget = torch.tensor([1.0, 2, 4, 8, 16], dtype=torch.float64)
    worth = failures_beside_a_success(budget, torch.tensor(chance, dtype=torch.float64))
    assert worth.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.7, 1.0])
def test_utilities_are_expectations_over_all_outcomes_of_a_group(size, chance):
    failures = mixed = 0.0
    for outcomes in itertools.product([0, 1], repeat=size):
        wins = sum(outcomes)
        likely = chance**wins * (1 - chance) ** (size - wins)
        failures += likely * (size - wins) * (wins > 0)
        mixed += likely * (0 < wins < size)
    size, chance = torch.tensor(float(size)), torch.tensor(chance)
    assert float(failures_beside_a_success(size, chance)) == pytest.approx(failures, abs=1e-6)
    assert float(mixed_group(size, chance)) == pytest.approx(mixed, abs=1e-6)


def test_the_most_failures_are_beside_a_success_where_greedy_does_not_look():
    best = allocate(CARD, 24, minimum=2)
    assert best.tolist() == [20, 2, 2]
    assert worth(best, CARD, "failures") == pytest.approx(12.425282, abs=1e-6)
    greedy = greedily(CARD, 24, 2, "failures")
    assert greedy.tolist() == [2, 20, 2]
    assert worth(greedy, CARD, "failures") == pytest.approx(10.189981, abs=1e-6)
    assert worth(torch.tensor([8, 8, 8]), CARD, "failures") == pytest.approx(6.661386, abs=1e-6)


def test_for_mixed_groups_greedy_is_optimal():
    best = allocate(CARD, 24, minimum=2, utility="mixed")
    # .05 and .95 are equally hard for G: (9, 5, 10) and (10, 5, 9) are both optimal.
    assert sorted(best.tolist()) == [5, 9, 10]
    assert int(best[1]) == 5
    assert sorted(greedily(CARD, 24, 2, "mixed").tolist()) == [5, 9, 10]
    assert worth(best, CARD, "mixed") == pytest.approx(1.708514, abs=1e-6)


@pytest.mark.parametrize("utility", ["failures", "mixed"])
@pytest.mark.parametrize(("minimum", "maximum"), [(1, 9), (2, 6), (2, 13)])
@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_is_better(utility, minimum, maximum, seed):
    random = torch.Generator().manual_seed(seed)
    chance = torch.rand(4, generator=random, dtype=torch.float64) ** (1 + seed % 3 * 2)
    best = allocate(chance, 19, minimum=minimum, maximum=maximum, utility=utility)
    assert int(best.sum()) == 19
    assert minimum <= int(best.min()) <= int(best.max()) <= maximum
    assert worth(best, chance, utility) == pytest.approx(
        exhaustively(chance, 19, minimum, maximum, utility), abs=1e-7
    )


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_prompts_without_hope_or_difficulty_share_evenly(chance):
    assert allocate(torch.full((5,), chance), 23).sort().values.tolist() == [4, 4, 5, 5, 5]


def test_order_of_prompts_does_not_matter():
    chance = torch.rand(20, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    straight = allocate(chance, 160, maximum=32)
    shuffled = allocate(chance[order], 160, maximum=32)
    assert worth(straight, chance, "failures") == pytest.approx(
        worth(shuffled, chance[order], "failures")
    )


@pytest.mark.parametrize("hardness", [1, 4])
def test_a_large_step_is_allocated_in_passing(hardness):
    # About 0.3 s on one core of 2 GHz; a bound that only a loss of the pruning breaks.
    chance = torch.rand(512, generator=torch.Generator().manual_seed(0)) ** hardness
    best = allocate(chance, 512 * 16, maximum=64)
    assert int(best.sum()) == 512 * 16
    even = torch.full((512,), 16)
    assert worth(best, chance, "failures") > 1.3 * worth(even, chance, "failures")


def test_all_at_the_minimum_is_the_only_choice_when_nothing_is_spare():
    assert allocate(CARD, 6).tolist() == [2, 2, 2]
    assert allocate(torch.zeros(0), 0).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"chance": CARD, "total": 5}, "5 responses are not enough for 3 prompts"),
        ({"chance": CARD, "total": 24, "minimum": 0}, "1 is the least"),
        ({"chance": CARD, "total": 24, "maximum": 7}, "too many for 3 prompts with at most 7"),
        ({"chance": torch.tensor([1.5]), "total": 4}, "probabilities in"),
        ({"chance": torch.tensor([math.nan]), "total": 4}, "probabilities in"),
    ],
)
def test_what_cannot_be_allocated_is_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        allocate(**arguments)


@pytest.mark.parametrize(
    ("weight", "choice", "scores"),
    [
        (1.0, 0, [0.8, 0.6, 0.3]),
        (0.5, 1, [0.4, 0.6, 0.6]),
        (0.2, 2, [0.16, 0.6, 0.78]),
    ],
)
def test_a_prompt_goes_to_the_model_that_is_good_and_cheap(weight, choice, scores):
    chance = torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64)
    cost = torch.tensor([1.0, 0.4, 0.1], dtype=torch.float64)
    chosen, found = route(chance, cost, weight=weight)
    assert found.tolist() == pytest.approx(scores)
    assert chosen == choice
