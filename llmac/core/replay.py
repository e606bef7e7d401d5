"""Rows that are not used up in the step they were sampled in, and wait for a later one."""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmac.core.plain_trajectory import from_plain, plain
from llmac.core.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What one step takes out of the buffer."""

    rows: list[Trajectory]
    """This step's in the order given, then those that waited."""
    expired: int
    """Rows that left the buffer without ever being used."""
    missing: int
    """How many rows fewer than wanted."""


@dataclass(kw_only=True)
class ReplayBuffer:
    """Each row is used in one step at most: the one it was sampled in, or one of the next `steps`.

    Younger rows come first, since they are closer to the policy that learns; among rows of an age
    chance decides. A row that is used, too old, or more than could still be used, is forgotten.
    What waits is remembered from step to step (`core.protocols.Stateful`).
    """

    steps: int
    """Steps that a row may wait; 0: what is not used at once is forgotten."""
    _waiting: list[Trajectory] = field(default_factory=list[Trajectory], init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a negative time."""
        if self.steps < 0:
            raise ValueError(f"replay_steps is at least 0; found {self.steps}")

    def draw(
        self, fresh: Sequence[Trajectory], *, count: int, per_prompt: int | None, seed: int
    ) -> Drawn:
        """Take in this step's rows, and choose those that it learns from.

        Args:
            fresh: rows of this step, of age 0.
            count: most rows to choose.
            per_prompt: most rows that answer one prompt, by its id; None: no such bound.
            seed: of this step and rank.
        """
        candidates = [*fresh, *self._waiting]
        order = list(range(len(candidates)))
        random.Random(f"replay-{seed}").shuffle(order)
        order.sort(key=lambda i: candidates[i].age)  # stable: chance decides within an age
        chosen: list[int] = []
        used: Counter[str] = Counter()
        for i in order:
            prompt = candidates[i].prompt.id
            full = per_prompt is not None and used[prompt] >= per_prompt
            if not full and len(chosen) < count:
                chosen.append(i)
                used[prompt] += 1
        taken = set(chosen)
        left = [candidates[i] for i in order if i not in taken]
        self._waiting = [
            dataclasses.replace(row, age=row.age + 1) for row in left if row.age < self.steps
        ][: count * self.steps]
        return Drawn(
            rows=[candidates[i] for i in sorted(chosen)],
            expired=len(left) - len(self._waiting),
            missing=count - len(chosen),
        )

    def __len__(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    def state(self) -> dict[str, Any]:
        """The rows that wait, with their prompts, as plain data."""
        return {"waiting": [plain(row) for row in self._waiting]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._waiting = [from_plain(entry) for entry in state["waiting"]]
