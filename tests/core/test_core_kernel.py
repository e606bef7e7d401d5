"""Outcomes of known prompts to chances of unknown ones."""

import math

import pytest
import torch

from llmac.core import kernel
from llmac.core.kernel import kernel_regression


def ask(known, outcomes, asked, *, age=None, responses=None, memory_steps=8.0):
    count = len(known)
    return kernel_regression(
        torch.as_tensor(known).double(),
        torch.as_tensor(outcomes).double(),
        torch.as_tensor(asked).double(),
        age=torch.ones(count) if age is None else torch.tensor(age),
        responses=torch.ones(count) if responses is None else torch.tensor(responses),
        memory_steps=memory_steps,
    )


def test_two_prompts_by_hand(monkeypatch):
    monkeypatch.setattr(kernel, "NOISE_LEVELS", (1.0,))
    found = ask([[0.0], [2.0]], [0.0, 1.0], [[2.0]], age=[1.0, 1.0], memory_steps=2.0)
    # Standardised x = -1, 1; squared distance 4 = m; k = 1 + e^-.5 = 1.606531 between them, 2 within.
    # K + I = [[3, 1.606531], [., 3]]; y - ȳ = (-.5, .5): the difference is its eigenvector with value
    # 3 - 1.606531 = 1.393469, so the solution is ∓.5 / 1.393469 = ∓.358817.
    # Asked at x = 1 and age 0, everything e^-½ as near: .5 + e^-.5 · .358817 · (2 - 1.606531)
    expected = 0.5 + math.exp(-0.5) * 0.5 / 1.393469 * (2 - 1.606531)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_leave_one_out_is_what_refitting_without_each_prompt_gives():
    """It takes the largest noise level whose honest predictions are not clearly worse than the best."""
    random = torch.Generator().manual_seed(1)
    known = torch.randn(12, 2, generator=random, dtype=torch.float64)
    outcomes = (known[:, 0] > 0).double() + 0.1 * torch.randn(
        12, generator=random, dtype=torch.float64
    )
    # As the function does it, but leaving out for real; features, width and level stay those of all.
    x = (known - known.mean(0)) / known.std(0, correction=0)
    apart = torch.cdist(x, x).square()
    width = apart[~torch.eye(12, dtype=torch.bool)].median()
    inner = 1 + torch.exp(-apart / (2 * width))
    wanted = outcomes - outcomes.mean()

    def honest_errors(level):
        errors = []
        for left_out in range(12):
            rest = [i for i in range(12) if i != left_out]
            solution = torch.linalg.solve(
                inner[rest][:, rest] + level * torch.eye(11, dtype=torch.float64), wanted[rest]
            )
            errors.append(wanted[left_out] - inner[left_out, rest] @ solution)
        return torch.stack(errors).square()

    errors = {level: honest_errors(level) for level in kernel.NOISE_LEVELS}
    best = min(errors, key=lambda level: float(errors[level].mean()))
    worse = {level: errors[level] - errors[best] for level in errors}
    as_good = [
        level
        for level, more in worse.items()
        if float(more.mean()) <= float(more.std(correction=0)) / 12**0.5
    ]
    assert best < max(as_good) < max(kernel.NOISE_LEVELS)
    solution = torch.linalg.solve(inner + max(as_good) * torch.eye(12, dtype=torch.float64), wanted)
    expected = outcomes.mean() + math.exp(-1 / 8.0) * inner @ solution
    torch.testing.assert_close(ask(known, outcomes, known), expected)


def test_order_scale_and_place_of_features_do_not_matter():
    random = torch.Generator().manual_seed(0)
    known, asked = torch.randn(20, 3, generator=random), torch.randn(5, 3, generator=random)
    outcomes = torch.rand(20, generator=random)
    straight = ask(known, outcomes, asked)
    order = torch.randperm(20, generator=random)
    torch.testing.assert_close(ask(known[order], outcomes[order], asked), straight)
    moved = torch.tensor([3.0, 0.1, 100.0])
    torch.testing.assert_close(
        ask(known * moved + 7, outcomes, asked * moved + 7), straight, rtol=1e-4, atol=1e-4
    )


def test_equal_outcomes_are_expected_everywhere_and_one_prompt_is_enough():
    far = [[100.0], [-3.0]]
    assert ask([[0.0], [1.0], [2.0]], [0.3] * 3, far).tolist() == pytest.approx([0.3, 0.3])
    assert ask([[5.0]], [0.7], far).tolist() == pytest.approx([0.7, 0.7])
    assert ask([[5.0], [5.0]], [0.0, 1.0], far).tolist() == pytest.approx([0.5, 0.5])


def test_where_prompts_say_nothing_the_mean_is_left():
    random = torch.Generator().manual_seed(1)
    known = torch.randn(200, 4, generator=random)
    outcomes = (torch.rand(200, generator=random) < 0.3).double()
    found = ask(known, outcomes, torch.randn(50, 4, generator=random))
    assert float((found - outcomes.mean()).abs().max()) < 0.15


def test_many_responses_are_believed_more_than_one():
    known, asked = [[0.0], [0.0], [1.0], [1.0]], [[0.0]]
    outcomes = [0.0, 1.0, 0.5, 0.5]
    even = ask(known, outcomes, asked)
    first = ask(known, outcomes, asked, responses=[50.0, 1.0, 1.0, 1.0])
    second = ask(known, outcomes, asked, responses=[1.0, 50.0, 1.0, 1.0])
    assert float(first) < float(even) < float(second)


def test_of_contradicting_outcomes_the_better_known_wins(monkeypatch):
    monkeypatch.setattr(kernel, "NOISE_LEVELS", (1.0,))
    # The mean is a half either way; at 0 fifty responses say yes, at 1 fifty say no.
    known, outcomes = [[0.0], [0.0], [1.0], [1.0]], [1.0, 0.0, 0.0, 1.0]
    first, second = ask(known, outcomes, [[0.0], [1.0]], responses=[50.0, 1.0, 50.0, 1.0]).tolist()
    assert first > 0.6
    assert second == pytest.approx(1 - first)


def test_old_outcomes_fade():
    # Long ago the first kind of prompt was solved, lately the second is; five of each.
    known = [[0.0], [1.0]] * 10
    outcomes = [1.0, 0.0] * 5 + [0.0, 1.0] * 5
    asked, age = [[0.0], [1.0]], [40.0] * 10 + [1.0] * 10
    first, second = ask(known, outcomes, asked, age=age, memory_steps=4.0).tolist()
    assert second - first > 0.5
    first, second = ask(known, outcomes, asked, age=age, memory_steps=1e9).tolist()
    assert second == pytest.approx(first, abs=1e-5)
