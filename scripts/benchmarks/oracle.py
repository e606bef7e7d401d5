"""A critic that checks the work: near-exact values of the arithmetic tasks, to see what values could be worth at best.

    critic: {name: "scripts/benchmarks/oracle.py:StepOracle"}

    V(s) = p + (1 - p) · luck,    p = Π over the steps still to come of (1 - error rate of such a step)

while every token so far is that of the right solution; p = 0 after the first wrong one. Luck is the chance that an
error is made up for by another. Rates are those of the step's own rollouts, of steps with and without a carry or
borrow. It knows the task: no method.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.measures import Measure
from llmac.core.types import CriticTargets, Rollouts, Values
from llmac.critics.bench import CriticBench

_NUMBERS = re.compile(r"[+-]?\d+")


@lru_cache(maxsize=65536)
def solution(prompt: str) -> tuple[str, tuple[int, ...], tuple[bool, ...]]:
    """The right response, where in it each result begins, and which results need a carry or a borrow.

    >>> solution("8+6-1=")
    ('8+6=14;14-1=13', (4, 12), (True, False))
    """
    value, *operations = (int(number) for number in _NUMBERS.findall(prompt.rstrip("=")))
    text, begins, critical = "", [], []
    for change in operations:
        ones = value % 10
        critical.append(not 0 <= ones + change <= 9)
        text += f"{';' if text else ''}{value}{change:+d}="
        begins.append(len(text))
        value += change
        text += str(value)
    return text, tuple(begins), tuple(critical)


@dataclass(frozen=True, kw_only=True)
class StepOracle:
    """Settings: none."""

    def build(self, bench: CriticBench) -> "LiveOracle":
        """The live critic."""
        return LiveOracle()


class LiveOracle:
    """Values from checking every step."""

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`; responses are characters, one a token."""
        right, ahead = self._checked(rollouts)
        outcome = rollouts.rewards.sum(1, keepdim=True).expand_as(rollouts.rewards)
        done, failed = torch.zeros(2), torch.zeros(2)
        for trajectory in rollouts.trajectories:
            count_steps(trajectory.prompt.source, trajectory.response_text, done, failed)
        rate = (failed + 0.5) / (done + 1.0)
        faultless = ((1 - rate) ** ahead).prod(-1) * right
        wrong = rollouts.action_mask & ~right
        luck = outcome[wrong].mean() if wrong.any() else torch.tensor(0.0)
        value = faultless + (1 - faultless) * luck
        return Values(
            at=value * starts, starts=starts, bootstrap=torch.zeros(len(rollouts.trajectories))
        )

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Nothing to learn."""
        return {}

    def _checked(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Whether the tokens before t are right [B, T]; plain and critical results still to come [B, T, 2]."""
        rows, width = rollouts.action_mask.shape
        right = torch.zeros(rows, width, dtype=torch.bool)
        ahead = torch.zeros(rows, width, 2)
        for row, trajectory in enumerate(rollouts.trajectories):
            text, begins, critical = solution(str(trajectory.prompt.source))
            response = trajectory.response_text
            same = next(
                (i for i, (a, b) in enumerate(zip(response, text, strict=False)) if a != b),
                min(len(response), len(text)),
            )
            right[row, : same + 1] = True
            for begin, hard in zip(begins, critical, strict=True):
                ahead[row, : begin + 1, int(hard)] += 1
        return right, ahead


def count_steps(prompt: object, response: str, done: Tensor, failed: Tensor) -> None:
    """Add the plain [0] and critical [1] steps of a response up to its first wrong one, and that one as failed."""
    text, begins, critical = solution(str(prompt))
    ends = [*(begin for begin in begins[1:]), len(text) + 1]
    for end, hard in zip(ends, critical, strict=True):
        done[int(hard)] += 1
        if response[:end] != text[:end]:
            failed[int(hard)] += 1
            return
