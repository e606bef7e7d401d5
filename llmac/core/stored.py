"""A plan that samples nothing: the responses are there already, and are replayed in a random order."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

from llmac.core.measures import Last, Mean, Measure, Sum
from llmac.core.protocols import PromptSource, RolloutEngine, Scorer
from llmac.core.types import AllSum, Trajectory, identity

Group = Sequence[Trajectory]


def share_of(
    trajectories: Sequence[Trajectory],
    *,
    rank: int,
    world_size: int,
    keep_above: float | None = None,
) -> list[Trajectory]:
    """One rank's part of stored responses: whole groups, dealt in turn.

    Args:
        trajectories: siblings adjacent, as they were sampled.
        rank: whose part.
        world_size: ranks.
        keep_above: only responses with a reward above it are dealt; None: all.

    Raises:
        ValueError: there are fewer groups than ranks, or none is left.
    """
    kept = trajectories
    if keep_above is not None:
        kept = [t for t in trajectories if t.reward is not None and t.reward > keep_above]
        if trajectories and not kept:
            best = max((t.reward for t in trajectories if t.reward is not None), default=None)
            raise ValueError(
                f"none of {len(trajectories)} stored responses has a reward above {keep_above} "
                f"(keep_above), the largest is {best}; lower it, or sample more"
            )
    groups = _groups(kept)
    if len(groups) < world_size:
        raise ValueError(
            f"{len(groups)} groups of stored responses cannot be shared by {world_size} processes; "
            "each needs at least one"
        )
    return [trajectory for group in groups[rank::world_size] for trajectory in group]


class Stored:
    """Offline learning: every step replays stored responses with the rewards they have.

    All groups are seen once before any is seen again, each time in another order. The order depends
    on nothing but `seed` and the number of the pass, so where a run stands is two numbers. Siblings
    are rows next to each other with the same prompt and group; they stay together. What the
    sampler, the trained policy and the reference say of a response are three things, as ever: none
    is taken for another because the response is old.
    """

    seed: int
    """Of the run: another seed, other orders. 0 until `build` sets it."""

    def __init__(
        self,
        *,
        path: str,
        prompts_per_step: int,
        length_limit: int,
        keep_above: float | None = None,
    ) -> None:
        """Nothing is read: `build` sets `stored`, and `seed`.

        Args:
            path: file of the rollouts.
            prompts_per_step: groups this rank replays in a step.
            length_limit: longest response to expect, tokens: the horizon of the losses.
            keep_above: only responses with a reward above it are handed over; None: all.
        """
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step is at least 1; found {prompts_per_step}")
        self.path = path
        self.keep_above = keep_above
        self.seed = 0
        self._groups_per_step = prompts_per_step
        self._length_limit = length_limit
        self._stored: Sequence[Trajectory] | None = None
        self._groups: list[Group] = []
        self._seen = 0

    @property
    def length_limit(self) -> int:
        """Response length, tokens, at which sampling was cut."""
        return self._length_limit

    @property
    def stored(self) -> Sequence[Trajectory] | None:
        """This rank's responses; None before they were handed over.

        Raises:
            ValueError: on setting: there is none, one has no reward, or one is too long.
        """
        return self._stored

    @stored.setter
    def stored(self, trajectories: Sequence[Trajectory] | None) -> None:
        if not trajectories:
            raise ValueError(f"{self.path} has no responses to replay; a plan needs at least one")
        for trajectory in trajectories:
            self._check(trajectory)
        self._stored = trajectories
        self._groups = _groups(trajectories)

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        """The next groups. Nothing is sampled, no prompt drawn and nothing scored.

        Args:
            engine: not asked.
            prompts: not asked.
            score: not asked.
            seed: of this step and rank, without effect: an order lasts for a whole pass.
            sum_across: not used.

        Returns:
            trajectories: siblings adjacent, groups numbered anew from 0.
            metrics:
                `rollout/stored_passes`: how often the stored responses were seen, on this rank;
                `rollout/sampled_tokens`: 0;
                `reward/mean`: which nobody else can report where nothing is scored.

        Raises:
            ValueError: no responses were handed over.
        """
        if self._stored is None:
            raise ValueError(
                f"no responses of {self.path} were handed over; set `stored` before the first step"
            )
        drawn = [self._group(self._seen + index) for index in range(self._groups_per_step)]
        self._seen += self._groups_per_step
        trajectories = [
            dataclasses.replace(trajectory, group=number)
            for number, group in enumerate(drawn)
            for trajectory in group
        ]
        rewards = [trajectory.reward or 0.0 for trajectory in trajectories]
        return trajectories, {
            "rollout/stored_passes": Last(self._seen / len(self._groups)),
            "rollout/sampled_tokens": Sum(0.0),
            "reward/mean": Mean(sum(rewards), float(len(rewards))),
        }

    def state(self) -> dict[str, Any]:
        """How many groups were replayed, and of how many there are."""
        return {"seen": self._seen, "groups": len(self._groups)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: there were more or fewer stored groups then.
        """
        if state["groups"] != len(self._groups):
            raise ValueError(
                f"the run replayed {state['groups']} groups of responses a process, and {self.path} "
                f"now has {len(self._groups)}; continue with the file it began with"
            )
        self._seen = state["seen"]

    def _group(self, number: int) -> Group:
        done, place = divmod(number, len(self._groups))
        order = list(range(len(self._groups)))
        random.Random(f"stored-{self.seed}-{done}").shuffle(order)
        return self._groups[order[place]]

    def _check(self, trajectory: Trajectory) -> None:
        name = f"{self.path}: a stored response to prompt {trajectory.prompt.id}"
        if trajectory.reward is None:
            raise ValueError(f"{name} has no reward; store responses that were scored")
        length = len(trajectory.response_ids)
        if length > self._length_limit:
            raise ValueError(
                f"{name} has {length} tokens, and the length limit of this run is "
                f"{self._length_limit}; raise rollout.max_new_tokens"
            )


def _groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """Rows next to each other that answer the same prompt in the same group."""
    runs = itertools.groupby(trajectories, key=lambda t: (t.prompt.id, t.group))
    return [list(run) for _, run in runs]
