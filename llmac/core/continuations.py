"""States that are continued to know what they are worth: which are equal, and how many continuations each gets."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llmac.core.types import Finish, Prompt, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """s_t = prompt + response[:t], as a response came through it."""

    origin: Trajectory
    """A response that came through it."""
    position: int
    """t, tokens of the response before the state."""

    @classmethod
    def before(cls, prompt: Prompt, group: int) -> "State":
        """s_0 of a prompt that nobody has answered yet."""
        nothing = Trajectory(
            prompt=prompt,
            response_ids=(),
            action_mask=(),
            sampler_logprobs=(),
            finish=Finish.PAUSED,
            group=group,
        )
        return cls(origin=nothing, position=0)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What an engine continues."""
        return (*self.origin.prompt.token_ids, *self.origin.response_ids[: self.position])

    @property
    def question(self) -> Hashable:
        """The same for states of one prompt. Its id is part of it: equal words may be judged otherwise."""
        return self.origin.prompt.id, self.origin.prompt.token_ids

    @property
    def key(self) -> Hashable:
        """The same for equal states, whichever responses they stand in."""
        return self.question, self.origin.response_ids[: self.position]


def merged(states: Sequence[State]) -> tuple[list[State], list[int]]:
    """Equal states once.

    Returns:
        distinct: one of each, the first, in the order in which they first appear.
        places: for each of `states`, which of `distinct` it is.

    >>> prompt = Prompt(id="p0", token_ids=(1,), source="?")
    >>> seen = [Trajectory(prompt=prompt, response_ids=ids, action_mask=(True,) * 2, sampler_logprobs=(0.0,) * 2,
    ...                    finish=Finish.STOP, group=0) for ids in ((5, 6), (5, 7))]
    >>> distinct, places = merged([State(origin=t, position=n) for t in seen for n in (0, 1, 2)])
    >>> [state.token_ids for state in distinct], places
    ([(1,), (1, 5), (1, 5, 6), (1, 5, 7)], [0, 1, 2, 0, 1, 3])
    """
    first: dict[Hashable, int] = {}
    distinct: list[State] = []
    places: list[int] = []
    for state in states:
        place = first.setdefault(state.key, len(distinct))
        if place == len(distinct):
            distinct.append(state)
        places.append(place)
    return distinct, places


def standard_error(outcomes: Sequence[float], reward_range: tuple[float, float]) -> float:
    """How far the mean of a few outcomes may be off, never 0: two more are imagined, one at each end of the range.

        se = √(s² / n),    s² = variance of the n outcomes and the two imagined ones, divided by n + 2

    Outcomes that are all the same would else pass for certain after the first few. For outcomes 0 and 1 this is
    Laplace's rule of succession: s² = p (1 - p) with p = (successes + 1) / (n + 2).

    Args:
        outcomes: n of them, at least one; unit of reward.
        reward_range: smallest and largest outcome.

    >>> round(standard_error([1., 0., 1., 0.], (0., 1.)), 4), round(standard_error([1.] * 9, (0., 1.)), 4)
    (0.25, 0.0958)
    """
    if not outcomes:
        raise ValueError(
            "the mean of no outcomes has no standard error; there must be at least one"
        )
    known = [*outcomes, *reward_range]
    mean = sum(known) / len(known)
    variance = sum((outcome - mean) ** 2 for outcome in known) / len(known)
    return math.sqrt(variance / len(outcomes))


def still_needed(
    outcomes: Sequence[float], *, target: float, most: int, reward_range: tuple[float, float]
) -> int:
    """How many more continuations a state needs for its standard error to fall to `target`.

        min( ⌈n (se / target)²⌉, 2n, most ) - n

    At most as many again as there are: from few outcomes one does not know well how many it takes. Nought if the error
    is small enough.

    Args:
        outcomes: n of them, at least one.
        target: standard error to reach, unit of reward.
        most: continuations a state gets in all.
        reward_range: as in `standard_error`.

    >>> still_needed([1., 0., 1., 0.], target=0.2, most=64, reward_range=(0., 1.))
    3
    """
    found = len(outcomes)
    needed = math.ceil(found * (standard_error(outcomes, reward_range) / target) ** 2)
    return max(0, min(needed, 2 * found, most) - found)


def affordable(
    wanted: Sequence[int], cost: Sequence[float], budget: float, *, at_least: int = 0
) -> list[int]:
    """How many of the continuations that the states of a prompt want can be paid for.

    Evenly: every state gets its first before any gets its second, in the order given.

    Args:
        wanted: by each state.
        cost: of one continuation of each state, tokens.
        budget: of all together, tokens.
        at_least: as many each state gets of what it wants, paid for or not.

    >>> affordable([3, 3, 1], [10., 20., 10.], 60.), affordable([3, 3], [10., 20.], 0., at_least=1)
    ([3, 1, 1], [1, 1])
    """
    given = [min(at_least, count) for count in wanted]
    left = budget - sum(count * price for count, price in zip(given, cost, strict=True))
    for level in range(at_least, max(wanted, default=0)):
        for place, price in enumerate(cost):
            # One that cannot be paid now will not be later: no more than now is ever left.
            if level < wanted[place] and price <= left:
                given[place] += 1
                left -= price
    return given


class PromptBudget:
    """Tokens that continuations of all states of a prompt may have together.

    What a continuation costs is known only afterwards. It is reckoned as long as the prompt's own responses still were
    after that many tokens, on average, so what is spent may be somewhat more or less.
    """

    def __init__(
        self,
        tokens: int | None,
        states: Sequence[State],
        longest: Sequence[int],
        responses: Sequence[Trajectory],
    ) -> None:
        """Reckon the cost of a continuation of each state.

        Args:
            tokens: to spend on each prompt; None: there is no limit.
            states: to be continued.
            longest: tokens after which a continuation of each state is cut.
            responses: of the step.
        """
        self._tokens, self._states = tokens, states
        self._short: set[int] = set()
        lengths: dict[Hashable, list[int]] = defaultdict(list)
        for response in responses:
            start = State(origin=response, position=0)
            lengths[start.question].append(len(response.response_ids))
        self._cost: list[float] = []
        self._members: dict[Hashable, list[int]] = defaultdict(list)
        for index, (state, limit) in enumerate(zip(states, longest, strict=True)):
            left = [n - state.position for n in lengths[state.question] if n > state.position]
            self._cost.append(float(min(limit, sum(left) / len(left)) if left else limit))
            self._members[state.question].append(index)

    @property
    def withheld(self) -> int:
        """States that did not get all they wanted."""
        return len(self._short)

    def allowed(self, wanted: Sequence[int], found: Sequence[Sequence[Trajectory]]) -> list[int]:
        """How many of the continuations that each state wants it gets now: its first in any case.

        Args:
            wanted: by each state.
            found: continuations that each state has, whole responses.
        """
        if self._tokens is None:
            return list(wanted)
        given = [0] * len(wanted)
        for members in self._members.values():
            spent = sum(
                len(t.response_ids) - self._states[n].position for n in members for t in found[n]
            )
            granted = affordable(
                [wanted[n] for n in members],
                [self._cost[n] for n in members],
                float(self._tokens - spent),
                at_least=0 if spent else 1,
            )
            for n, count in zip(members, granted, strict=True):
                given[n] = count
            self._short |= {n for n in members if given[n] < wanted[n]}
        return given
