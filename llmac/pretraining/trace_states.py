"""States to show to a teacher: as many that ended well as badly, and from all parts of responses."""

import random
from collections.abc import Hashable
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from llmac.core.continuations import State
from llmac.core.scores import fraction_of
from llmac.core.types import Rollouts

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A state, and what came of the response it stands in."""

    state: State
    outcome: float
    """From 0 to 1."""

    @property
    def solved(self) -> bool:
        """Whether the response ended in the upper half of the range."""
        return self.outcome > 0.5

    @property
    def fraction(self) -> float:
        """Of the response before the state."""
        return self.state.position / max(len(self.state.origin.response_ids), 1)

    @property
    def cell(self) -> str:
        """Outcome and third of the response."""
        third = THIRDS[min(int(3 * self.fraction), 2)]
        return f"{'right' if self.solved else 'wrong'}/{third}"


def choose(
    rollouts: Rollouts,
    starts: Bool[Tensor, "B T"],
    reward_range: tuple[float, float],
    *,
    count: int,
    seed: int,
) -> list[Chosen]:
    """At most `count` states where a critic is asked, a sixth from each outcome and third of a response.

    Equal states are there once, with the outcome of one of the responses through them, drawn at random. A cell that has
    fewer gives what it has, and no other takes its place. From each, prompts take turns: a long response, or one of
    many siblings, does not fill it.

    Args:
        rollouts: responses with rewards.
        starts: where the critic is asked.
        reward_range: outcome of a failure and of a success.
        count: of states, at least 6.
        seed: of everything drawn.
    """
    drawn = random.Random(f"traces-{seed}")
    places: list[list[int]] = starts.nonzero().tolist()
    drawn.shuffle(places)
    seen: set[Hashable] = set()
    cells: dict[str, list[Chosen]] = {}
    for row, position in places:
        origin = rollouts.trajectories[row]
        state = State(origin=origin, position=position)
        if state.key in seen or origin.reward is None:
            continue
        seen.add(state.key)
        one = Chosen(state=state, outcome=fraction_of(origin.reward, reward_range))
        cells.setdefault(one.cell, []).append(one)
    chosen = [
        one for name in sorted(cells) for one in _in_turn(cells[name])[: count // (2 * len(THIRDS))]
    ]
    drawn.shuffle(chosen)
    return chosen


def _in_turn(states: list[Chosen]) -> list[Chosen]:
    """The first of each prompt, then the second of each, and so on."""
    turn: dict[Hashable, int] = {}
    ordered: list[tuple[int, int]] = []
    for index, one in enumerate(states):
        number = turn.get(one.state.question, 0)
        turn[one.state.question] = number + 1
        ordered.append((number, index))
    return [states[index] for _, index in sorted(ordered)]
