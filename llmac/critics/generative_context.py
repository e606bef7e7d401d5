"""What a generative critic is told about the writer it judges: in-context conditioning.

A score depends on who goes on writing. Everything told here is of earlier steps: the outcomes of the step that is being
judged are what the scores are to predict, and a baseline that has seen them would be none.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmac.core.continuations import State
from llmac.core.measures import Last, Metrics
from llmac.core.protocols import Decode
from llmac.core.scores import fraction_of, smoothed
from llmac.core.types import Rollouts, Trajectory
from llmac.critics.generative_prompt import NOTHING_TOLD, problem_text
from llmac.critics.outcomes import outcomes
from llmac.runtime.context import Runtime

if TYPE_CHECKING:
    from llmac.critics.generative import GenerativeConfig

Conditioning = Literal["none", "success_rate", "attempts", "both"]


class Context(Protocol):
    """Knows something about the writer. Implementations: `SuccessRate`, `Attempts`, `Several` of them (or of none)."""

    def about(self, state: State, length_limit: int) -> Mapping[str, Any]:
        """Variables of the template for the state; nothing that happened in this step."""
        ...

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Take in the outcomes of a step that has been judged. Collective: all ranks then know the same."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything to continue from, as JSON has it."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        ...


class SuccessRate:
    """How often the writer succeeds lately, and how many tokens it has used and has left.

        e <- rate · e + (1 - rate) · mean(z),    z: outcomes of a step as fractions of the range

    e begins with the first step's mean; until then nothing is told. The header of GenAC as it was re-implemented, which
    has the step's own outcomes in e; here they enter after the step.
    """

    def __init__(self, runtime: Runtime, *, rate: float, reward_range: tuple[float, float]) -> None:
        """Nothing is known yet.

        Args:
            runtime: the ranks, whose outcomes count together.
            rate: how much of e stays from step to step.
            reward_range: outcome of a failure and of a success.
        """
        self._runtime, self._rate, self._range = runtime, rate, reward_range
        self.success_rate: float | None = None

    def about(self, state: State, length_limit: int) -> Mapping[str, Any]:
        """The rate, and tokens used and left."""
        return {
            "success_rate": self.success_rate,
            "tokens_used": state.position,
            "tokens_left": length_limit - state.position,
        }

    def observe(self, rollouts: Rollouts) -> Metrics:
        """One more step of the average. Collective."""
        total, known = outcomes(rollouts)
        here = [fraction_of(z, self._range) for z in total[known & ~rollouts.replayed].tolist()]
        seen = self._runtime.sum(total.new_tensor([sum(here), len(here)]))
        if float(seen[1]):
            mean = float(seen[0] / seen[1])
            self.success_rate = smoothed(self.success_rate, mean, rate=self._rate)
        return {} if self.success_rate is None else {"critic/success_rate": Last(self.success_rate)}

    def state(self) -> dict[str, Any]:
        """The average."""
        return {"success_rate": self.success_rate}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from it; from a critic that had none, from the beginning."""
        self.success_rate = state.get("success_rate")


class Attempts:
    """A few responses of the writer to other prompts, from the last step that was judged, and how they ended.

    Right and wrong ones in turn, as far as there are any, at most one of a prompt; which ones is drawn by a hash, so
    that all ranks and a resumed run find the same.
    """

    def __init__(
        self,
        runtime: Runtime,
        read: Decode,
        *,
        count: int,
        tokens: int,
        reward_range: tuple[float, float],
    ) -> None:
        """Nothing is known yet.

        Args:
            runtime: the ranks.
            read: the writer's tokens as text.
            count: attempts told of.
            tokens: of each response, after which it is cut.
            reward_range: outcome of a failure and of a success; the upper half is right.
        """
        self._runtime, self._read = runtime, read
        self._count, self._tokens, self._range = count, tokens, reward_range
        self._attempts: list[dict[str, Any]] = []

    def about(self, state: State, length_limit: int) -> Mapping[str, Any]:
        """The attempts that are not at the state's own problem."""
        own = problem_text(state.origin.prompt)
        return {"attempts": [a for a in self._attempts if a["problem"] != own]}

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Replace them by some of this step. Collective."""
        total, known = outcomes(rollouts)
        mine: dict[bool, dict[str, tuple[str, Trajectory]]] = {True: {}, False: {}}
        usable = (known & ~rollouts.replayed).tolist()
        for t, outcome, counts in zip(rollouts.trajectories, total.tolist(), usable, strict=True):
            if counts:
                solved = fraction_of(outcome, self._range) > 0.5
                drawn = (_draw(t), t)
                problem = problem_text(t.prompt)
                mine[solved][problem] = min(mine[solved].get(problem, drawn), drawn, key=_first)
        found = [
            (order, {"problem": problem, "response": self._text(t), "solved": solved})
            for solved, kind in mine.items()
            for problem, (order, t) in sorted(kind.items(), key=lambda entry: entry[1][0])[
                : self._count
            ]
        ]
        everyone = sorted(
            (entry for part in self._runtime.gather(found) for entry in part), key=_first
        )
        right = [attempt for _, attempt in everyone if attempt["solved"]]
        wrong = [attempt for _, attempt in everyone if not attempt["solved"]]
        chosen = _in_turn(right, wrong, self._count)
        self._attempts = chosen or self._attempts
        return {}

    def state(self) -> dict[str, Any]:
        """The attempts."""
        return {"attempts": self._attempts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with them; from a critic that had none, without."""
        self._attempts = list(state.get("attempts", []))

    def _text(self, trajectory: Trajectory) -> str:
        cut = len(trajectory.response_ids) > self._tokens
        return self._read(trajectory.response_ids[: self._tokens]) + (" ..." if cut else "")


class Several:
    """All of some contexts, none included."""

    def __init__(self, *contexts: Context) -> None:
        """Those."""
        self._contexts = contexts

    def about(self, state: State, length_limit: int) -> Mapping[str, Any]:
        """What all of them say; what none of them does is not told."""
        told = dict(NOTHING_TOLD)
        for context in self._contexts:
            told |= context.about(state, length_limit)
        return told

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Each in turn. Collective."""
        metrics: Metrics = {}
        for context in self._contexts:
            metrics = {**metrics, **context.observe(rollouts)}
        return metrics

    def state(self) -> dict[str, Any]:
        """Of all."""
        return {name: entry for c in self._contexts for name, entry in c.state().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Each takes what is its own."""
        for context in self._contexts:
            context.restore(state)


def contexts(config: "GenerativeConfig", runtime: Runtime, read: Decode) -> Several:
    """Those that the settings ask for, with nothing known yet.

    Args:
        config: `conditioning`, and what each kind is told.
        runtime: the ranks.
        read: the writer's tokens as text.
    """
    found: list[Context] = []
    if config.conditioning in ("success_rate", "both"):
        rate = config.success_rate_memory
        found.append(SuccessRate(runtime, rate=rate, reward_range=config.reward_range))
    if config.conditioning in ("attempts", "both"):
        found.append(
            Attempts(
                runtime,
                read,
                count=config.attempts,
                tokens=config.attempt_tokens,
                reward_range=config.reward_range,
            )
        )
    return Several(*found)


def _draw(trajectory: Trajectory) -> str:
    what = repr((trajectory.prompt.id, trajectory.response_ids))
    return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


def _first(entry: tuple[str, Any]) -> str:
    return entry[0]


def _in_turn(
    right: Sequence[dict[str, Any]], wrong: Sequence[dict[str, Any]], count: int
) -> list[dict[str, Any]]:
    """At most `count`, right and wrong alternating while there are both, no problem twice."""
    chosen: list[dict[str, Any]] = []
    queues = [list(right), list(wrong)]
    while len(chosen) < count and any(queues):
        for queue in queues:
            seen = {attempt["problem"] for attempt in chosen}
            while queue and queue[0]["problem"] in seen:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen
