"""Controllers of SAFE: numbers worked out by hand, bounds, and what they must not do."""

import dataclasses
import random

import pytest

from llmac.core.controllers import (
    Phase,
    PIDState,
    ThresholdState,
    entropy_gate,
    move_threshold,
    pid_step,
    plain_gate,
    training_phase,
)


def run(rewards, kls=None, **settings):
    """State and threshold after each step."""
    state, seen = ThresholdState(), []
    for index, reward in enumerate(rewards):
        kl = 0.0 if kls is None else kls[index]
        state, threshold = move_threshold(state, kl=kl, reward=reward, **settings)
        seen.append((state, threshold))
    return seen


def test_the_controller_answers_how_fast_rewards_rise():
    state, controls, averages = PIDState(), [], []
    for reward in (0.5, 0.7, 0.6, 0.2):
        state, control = pid_step(state, reward)
        controls.append(control)
        averages.append(state.average)
    # step 2: e = .95 * .5 + .05 * .7 = .51; err = I = .01 - .001 = .009
    #         u = .3 * .009 + .01 * .009 + .05 * (.009 - 0) = .00324
    # step 3: e = .5145; err = .0035; I = .0125; u = .00105 + .000125 + .05 * (.0035 - .009) = .0009
    assert controls == pytest.approx([0.0, 0.00324, 0.00090, -0.006071], abs=1e-6)
    assert averages == pytest.approx([0.5, 0.51, 0.5145, 0.498775])


def test_the_integral_is_bounded():
    state = PIDState(average=0.0)
    for _ in range(5):
        state, _ = pid_step(state, 100.0)
    assert state.integral == 1.0
    for _ in range(5):
        state, _ = pid_step(state, -1000.0)
    assert state.integral == -1.0


def test_the_kl_is_smoothed_from_zero():
    seen = run([0.5] * 4, kls=[1.0] * 4)
    assert [state.kl for state, _ in seen] == pytest.approx([0.1, 0.19, 0.271, 0.3439])


@pytest.mark.parametrize(
    ("rewards", "phase", "threshold"),
    [
        ([0.1] * 49, Phase.WARMUP, 0.45),
        ([0.1] * 50, Phase.PLATEAU, 0.24),
        ([0.1] * 50 + [0.2] * 50, Phase.CLIMBING, 0.36),
        ([0.8] * 100, Phase.CONVERGED, 0.30),
        ([0.8, 0.9] * 50, Phase.PLATEAU, 0.24),  # high, and not steady: deviation .05
        ([0.2] * 50 + [0.1] * 50, Phase.PLATEAU, 0.24),
    ],
)
def test_the_phase_of_training_sets_the_threshold(rewards, phase, threshold):
    state, last = run(rewards, gains=(0.0, 0.0, 0.0))[-1]
    assert last.phase is phase
    assert last.value == pytest.approx(threshold)
    assert len(state.rewards) <= 100


def test_a_second_window_that_is_not_full_is_no_comparison():
    rising = [0.0] * 40 + [0.5] * 50
    assert training_phase(rising) is Phase.PLATEAU
    assert training_phase([0.0] * 10 + rising) is Phase.CLIMBING


def test_only_the_last_two_windows_are_read():
    rewards = [random.Random(0).random() for _ in range(300)]
    assert training_phase(rewards, window=7) is training_phase(rewards[-14:], window=7)


@pytest.mark.parametrize(
    ("kl", "entropy", "penalty"),
    # .1 * .14^2 = .00196, times 2 / (1.9 + .1), 2 / (.4 + .1), and the floor of .5
    [(0.5, 1.9, 0.00196), (0.5, 0.4, 0.00784), (0.5, 5.0, 0.00098), (0.3, 1.9, 0.0)],
)
def test_the_gate_is_dearer_where_entropy_is_low(kl, entropy, penalty):
    gate = entropy_gate(kl, threshold=0.36, entropy=entropy)
    assert gate.penalty == pytest.approx(penalty, abs=1e-9)


def test_the_asymmetric_gate_is_one_sided():
    assert plain_gate(0.5, threshold=0.3).penalty == pytest.approx(0.004)
    assert plain_gate(0.1, threshold=0.3) == plain_gate(0.3, threshold=0.3)
    assert plain_gate(0.1, threshold=0.3).penalty == plain_gate(0.1, threshold=0.3).slope == 0.0


@pytest.mark.parametrize("kl", [0.0, 0.2, 0.3, 0.31, 0.5, 2.0])
@pytest.mark.parametrize("entropy", [0.0, 0.4, 5.0])
def test_slopes_are_finite_differences_of_the_penalties(kl, entropy):
    h = 1e-6
    for gate in (
        lambda x: entropy_gate(x, threshold=0.3, entropy=entropy, coef=0.7),
        lambda x: plain_gate(x, threshold=0.3, coef=0.7),
    ):
        difference = (gate(kl + h).penalty - gate(kl - h).penalty) / (2 * h)
        assert gate(kl).slope == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("gains", [(0.3, 0.01, 0.05), (50.0, 20.0, 10.0)])
def test_thresholds_never_leave_their_bounds(gains):
    dice = random.Random(1)
    rewards = [dice.uniform(-10, 10) for _ in range(400)]
    kls = [dice.expovariate(1.0) for _ in rewards]
    values = [threshold.value for _, threshold in run(rewards, kls, gains=gains)]
    assert min(values) >= 0.1
    assert max(values) <= 0.6
    assert len(set(values)) > 10


def test_rising_rewards_open_the_gate_and_falling_ones_close_it():
    rising = run([0.01 * step for step in range(40)])[-1][1]
    falling = run([-0.01 * step for step in range(40)])[-1][1]
    assert rising.control > 0 > falling.control
    assert rising.value > 0.45 > falling.value


def test_states_are_never_changed_in_place():
    before = ThresholdState()
    move_threshold(before, kl=1.0, reward=1.0)
    assert before == ThresholdState()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.kl = 1.0


def test_a_window_without_steps_is_refused():
    with pytest.raises(ValueError, match="a window of rewards has at least one step; found 0"):
        training_phase([0.5], window=0)
