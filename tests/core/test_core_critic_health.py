"""What training says of its critic at every step: bias, asymmetry against the odds, explained variance by thirds."""

import pytest
import torch

from llmac.core.diagnostics import critic_health, explained_variance
from llmac.core.types import CriticTargets, Values

BIAS, ASYMMETRY = "critic/value_bias", "critic/advantage_asymmetry"
THIRDS = [f"critic/vf_explained_var/{third}" for third in ("first", "middle", "last")]


def health(values, outcomes, mask=None, returns=None, **options):
    values, outcomes = torch.tensor(values), torch.tensor(outcomes)
    mask = torch.ones(values.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    returns = outcomes[:, None].expand_as(values) if returns is None else torch.tensor(returns)
    measures = critic_health(
        Values(at=values, starts=mask, bootstrap=torch.zeros(len(outcomes))),
        CriticTargets(returns=returns, value_mask=mask, old_values=values),
        outcomes,
        **options,
    )
    return {name: measure.value for name, measure in measures.items()}


def test_a_calibrated_critic_has_asymmetry_one_at_any_success_rate():
    # V = p = .25: A = .75 once and -.25 three times: (.25 / .75) / (1 / 3).
    found = health([[0.25]] * 4, [1.0, 0.0, 0.0, 0.0])
    assert found[ASYMMETRY] == pytest.approx(1.0)
    assert found[BIAS] == pytest.approx(0.0)


def test_a_critic_that_overestimates_has_asymmetry_above_one():
    # V = .5 while p = .25: .5 / .5 = 1 looks balanced, and the odds of 1/3 show that it is not.
    found = health([[0.5]] * 4, [1.0, 0.0, 0.0, 0.0])
    assert found[ASYMMETRY] == pytest.approx(3.0)
    assert found[BIAS] == pytest.approx(0.25)
    found = health([[0.1]] * 4, [1.0, 0.0, 0.0, 0.0])
    assert found[ASYMMETRY] == pytest.approx(0.3 / 0.9)
    assert found[BIAS] == pytest.approx(-0.15)


def test_the_odds_count_states_and_not_responses():
    # A success of one state and a failure of three, V = 1/4 = the success rate of a state: calibrated.
    mask = [[True, False, False], [True, True, True]]
    found = health([[0.25, 9.0, 9.0], [0.25] * 3], [1.0, 0.0], mask)
    assert found[ASYMMETRY] == pytest.approx(1.0)
    assert found[BIAS] == pytest.approx(0.0)


@pytest.mark.parametrize("outcomes", [[1.0, 1.0], [0.0, 0.0]])
def test_without_both_outcomes_there_is_no_asymmetry(outcomes):
    found = health([[0.5], [0.5]], outcomes)
    assert ASYMMETRY not in found
    assert BIAS in found


def test_values_above_every_success_have_no_asymmetry():
    assert ASYMMETRY not in health([[1.5], [0.5]], [1.0, 0.0])


def test_the_threshold_tells_failures_from_successes():
    values, outcomes = [[0.0]] * 2, [1.0, -1.0]
    assert health(values, outcomes, threshold=0.0)[ASYMMETRY] == pytest.approx(1.0)
    assert ASYMMETRY not in health(values, outcomes, threshold=2.0)


def test_thirds_are_of_each_response_and_skip_what_does_not_count():
    # Row 0 has six states and row 1 three, with a token that does not count between them. A critic that learns
    # the outcome in the middle third explains nothing before.
    mask = [[True] * 6, [True, False, True, True, False, False]]
    values = [[0.5, 0.5, 1.0, 1.0, 0.5, 0.5], [0.5, 7.0, 0.0, 1.0, 7.0, 7.0]]
    found = health(values, [1.0, 0.0], mask)
    assert found[THIRDS[0]] == pytest.approx(0.0, abs=1e-6)
    assert found[THIRDS[1]] == pytest.approx(1.0)
    # .5, .5 of the success and 1 of the failure: errors .5, .5, -1, Var .5, of returns 1, 1, 0, Var 2/9
    assert found[THIRDS[2]] == pytest.approx(1 - 0.5 / (2 / 9))


def test_bias_and_thirds_are_against_the_targets():
    # λ < 1: what the critic should have said is not the outcome.
    returns = [[0.5, 0.75, 1.0], [0.5, 0.25, 0.0]]
    found = health(returns, [1.0, 0.0], returns=returns)
    assert found[BIAS] == 0.0
    assert [found[third] for third in THIRDS] == [0.0, 1.0, 1.0]  # nothing to explain at the start


def test_parts_of_a_step_on_two_ranks_are_the_step():
    generator = torch.Generator().manual_seed(0)
    values, outcomes = torch.rand(6, 4, generator=generator), torch.tensor([1.0, 0, 0, 1, 1, 0])
    whole = health(values.tolist(), outcomes.tolist())
    seen = []

    def record(x):
        seen.append(x)
        return x

    health(values[:2].tolist(), outcomes[:2].tolist(), sum_across=record)
    others = list(seen)
    with_others = health(
        values[2:].tolist(), outcomes[2:].tolist(), sum_across=lambda x: x + others.pop(0)
    )
    assert with_others[ASYMMETRY] == pytest.approx(whole[ASYMMETRY])
    mask = torch.ones(6, 4, dtype=torch.bool)
    returns = outcomes[:, None].expand(6, 4)
    first = mask & (torch.arange(4) < 2)  # positions 0, 1 of four: 3·0//4 = 3·1//4 = 0
    assert whole[THIRDS[0]] == pytest.approx(float(explained_variance(values, returns, first)))
