"""What steers a run from step to step: a PID controller, training phases, KL gates.

Every one is a small frozen state and a plain function from it to the next; who remembers the state
is another's business. Constants are those of SAFE's released code (arXiv:2602.04651).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, pstdev


@dataclass(frozen=True, slots=True, kw_only=True)
class PIDState:
    """What a PID controller of the reward's velocity remembers."""

    average: float | None = None
    """Moving average of the rewards; None: none was seen."""
    integral: float = 0.0
    error: float = 0.0


def pid_step(
    state: PIDState,
    reward: float,
    *,
    gains: tuple[float, float, float] = (0.3, 0.01, 0.05),
    decay: float = 0.95,
    target: float = 0.001,
    limit: float = 1.0,
) -> tuple[PIDState, float]:
    """One step of a PID controller that wants rewards to rise by `target` a step.

        e' = decay · e + (1 - decay) · reward
        err = (e' - e) - target
        I = clip(I + err, ±limit)
        u = k_p · err + k_i · I + k_d · (err - err_before)

    The first reward is only stored. SAFE: arXiv:2602.04651.

    Args:
        state: after the step before.
        reward: of this step, any unit.
        gains: k_p, k_i, k_d.
        decay: of the moving average.
        target: wanted rise of the average a step, unit of reward.
        limit: bound of the integral.

    Returns:
        The next state, and u: positive when rewards rise faster than wanted.

    >>> state, control = pid_step(PIDState(), 0.5)
    >>> control
    0.0
    >>> round(pid_step(state, 0.7)[1], 5)
    0.00324
    """
    if state.average is None:
        return PIDState(average=reward), 0.0
    average = decay * state.average + (1 - decay) * reward
    error = average - state.average - target
    integral = min(max(state.integral + error, -limit), limit)
    proportional, integrating, differentiating = gains
    control = (
        proportional * error + integrating * integral + differentiating * (error - state.error)
    )
    return PIDState(average=average, integral=integral, error=error), control


class Phase(StrEnum):
    """How training goes, judged by its rewards."""

    WARMUP = "warmup"
    """Fewer rewards than a window: nothing is known yet."""
    CLIMBING = "climbing"
    """The last window is better than the one before."""
    CONVERGED = "converged"
    """High and steady."""
    PLATEAU = "plateau"
    """Neither."""

    @property
    def tolerance(self) -> float:
        """By how much the threshold of a KL gate is multiplied in this phase."""
        return {"warmup": 1.5, "climbing": 1.2, "converged": 1.0, "plateau": 0.8}[self.value]


def training_phase(
    rewards: Sequence[float],
    *,
    window: int = 50,
    rise: float = 0.01,
    spread: float = 0.02,
    high: float = 0.7,
) -> Phase:
    """The phase that a history of rewards tells of.

    Fewer than `window` rewards: warm-up. Else climbing if the mean of the last window is more than
    `rise` above that of the window before, for which there must be two full windows; else converged
    if the last window's standard deviation (population) is below `spread` and its mean above
    `high`; else plateau. SAFE: arXiv:2602.04651.

    Args:
        rewards: mean reward of each step, the oldest first; only the last two windows are read.
        window: steps.
        rise: unit of reward.
        spread: unit of reward.
        high: unit of reward.

    >>> training_phase([0.1]), training_phase([0.1] * 50), training_phase([0.9] * 50)
    (<Phase.WARMUP: 'warmup'>, <Phase.PLATEAU: 'plateau'>, <Phase.CONVERGED: 'converged'>)
    """
    if window < 1:
        raise ValueError(f"a window of rewards has at least one step; found {window}")
    if len(rewards) < window:
        return Phase.WARMUP
    recent, before = rewards[-window:], rewards[-2 * window : -window]
    if len(before) == window and fmean(recent) > fmean(before) + rise:
        return Phase.CLIMBING
    steady = pstdev(recent) < spread and fmean(recent) > high
    return Phase.CONVERGED if steady else Phase.PLATEAU


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePrice:
    """What a KL costs at a gate, and what a little more of it would."""

    penalty: float
    slope: float
    """Derivative of the penalty by the KL it was asked for."""


def entropy_gate(
    kl: float,
    *,
    threshold: float,
    entropy: float,
    coef: float = 0.1,
    strength: float = 2.0,
    floor: float = 0.5,
) -> GatePrice:
    """A penalty on the KL above a threshold, larger where the policy has little entropy left.

        penalty = coef · max(0, kl - threshold)² · max(floor, strength / (entropy + 0.1))

    SAFE: arXiv:2602.04651.

    Args:
        kl: smoothed KL to the reference, nats a token.
        threshold: nats a token.
        entropy: of the policy, nats a token; at least 0. A constant for the slope.
        coef: weight.
        strength: over entropy + 0.1 the amplification.
        floor: the amplification is never less.

    >>> gate = entropy_gate(0.5, threshold=0.36, entropy=0.4)
    >>> round(gate.penalty, 5), round(gate.slope, 5)
    (0.00784, 0.112)
    """
    beyond = max(0.0, kl - threshold)
    amplified = coef * max(floor, strength / (max(entropy, 0.0) + 0.1))
    return GatePrice(penalty=amplified * beyond**2, slope=2 * amplified * beyond)


def plain_gate(kl: float, *, threshold: float, coef: float = 0.1) -> GatePrice:
    """A penalty on the KL above a threshold, whatever the entropy.

        penalty = coef · max(0, kl - threshold)²

    One-sided, hence the asymmetric controller of SAFE's code, without its momentum term.

    Args:
        kl: KL to the reference, nats a token.
        threshold: nats a token.
        coef: weight.

    >>> round(plain_gate(0.5, threshold=0.3).penalty, 6)
    0.004
    """
    beyond = max(0.0, kl - threshold)
    return GatePrice(penalty=coef * beyond**2, slope=2 * coef * beyond)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdState:
    """What a moving KL threshold remembers: smoothed KL, controller, latest rewards."""

    kl: float = 0.0
    pid: PIDState = PIDState()
    rewards: tuple[float, ...] = ()
    """Of the last two windows at most, the oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Where the gate stands in a step, and why."""

    value: float
    """Nats a token."""
    control: float
    """u of the PID controller."""
    phase: Phase


def move_threshold(
    state: ThresholdState,
    *,
    kl: float,
    reward: float,
    base: float = 0.3,
    bounds: tuple[float, float] = (0.1, 0.6),
    decay: float = 0.9,
    gains: tuple[float, float, float] = (0.3, 0.01, 0.05),
    window: int = 50,
    high: float = 0.7,
) -> tuple[ThresholdState, Threshold]:
    """Take in a step's KL and reward, and say where the KL threshold is now.

        ks' = decay · ks + (1 - decay) · kl                    from 0
        threshold = clip((base + u) · tolerance(phase), bounds)

    u is the PID controller's (`pid_step`), the phase that of the rewards (`training_phase`): a run
    whose rewards rise may go further from the reference than one that stands still.

    Args:
        state: after the step before.
        kl: of this step, nats a token.
        reward: mean reward of this step.
        base: threshold before control and phase, nats a token.
        bounds: smallest and largest threshold.
        decay: of the smoothed KL.
        gains: of the PID controller.
        window: of the phases, steps.
        high: reward above which a steady run has converged.

    >>> state, threshold = move_threshold(ThresholdState(), kl=1.0, reward=0.5)
    >>> round(state.kl, 6), round(threshold.value, 6), threshold.phase.value
    (0.1, 0.45, 'warmup')
    """
    pid, control = pid_step(state.pid, reward, gains=gains)
    rewards = (*state.rewards, reward)[-2 * window :]
    phase = training_phase(rewards, window=window, high=high)
    low, highest = bounds
    value = min(max((base + control) * phase.tolerance, low), highest)
    smoothed = decay * state.kl + (1 - decay) * kl
    return (
        ThresholdState(kl=smoothed, pid=pid, rewards=rewards),
        Threshold(value=value, control=control, phase=phase),
    )
