"""How a generative critic learns: REINFORCE on what it wrote, by the Brier reward of the score at its end.

    R_j = 1 - (z_j - v_j)², 0 without a score           core.scores.brier_reward
    loss = -(1 / Σ_j M_j) Σ_j Σ_u c_ju (R_j - baseline_j) log π(o_ju | prompt_j, o_j,<u)

M_j is the length of score j in tokens, c = min(π_train / μ, cap) without gradient. Generative critic of
arXiv:2604.10701, whose paper calls this raw REINFORCE.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmac.algorithms.score_function import ScoreFunctionPolicy
from llmac.core.collate import collate
from llmac.core.measures import Metrics
from llmac.core.protocols import Completion
from llmac.core.scores import Baseline, above_baseline, brier_reward
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.critics.bench import TrainedPolicy
from llmac.runtime.context import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the critic wrote about one state."""

    prompt_ids: tuple[int, ...]
    """What it read."""
    completions: tuple[Completion, ...]
    values: tuple[float | None, ...]
    """v of each completion, in [0, 1]; None: it has no score."""
    group: int
    """Of the response in which the state stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What was written about a state, and what became of the responses that came through it."""

    said: Written
    outcomes: tuple[float, ...]
    """z of each of those responses, in [0, 1]; at least one."""

    @property
    def rewards(self) -> list[float]:
        """R of each completion."""
        return [brier_reward(value, self.outcomes) for value in self.said.values]


class ScoreLearner:
    """Moves a language model towards scores that come true."""

    def __init__(
        self,
        policy: TrainedPolicy,
        runtime: Runtime,
        *,
        baseline: Baseline,
        importance_cap: float | None,
        length_limit: int,
    ) -> None:
        """Put the parts together.

        Args:
            policy: the language model.
            runtime: the ranks.
            baseline: what rewards are compared with.
            importance_cap: largest weight π_train/μ of a token; None: no weights.
            length_limit: tokens after which a score was cut.
        """
        self._policy, self._runtime = policy, runtime
        self._baseline: Baseline = baseline
        self._length_limit = length_limit
        self._algorithm = (
            ScoreFunctionPolicy()
            if importance_cap is None
            else ScoreFunctionPolicy(mismatch="token_truncate", mismatch_high=importance_cap)
        )

    def learn(self, lessons: Sequence[Lesson], *, spare: tuple[int, ...]) -> Metrics:
        """One update. Collective, also for ranks without a lesson; nothing happens where no rank has one.

        Args:
            lessons: of this rank.
            spare: a prompt for a row that counts nothing, by which a rank without lessons takes part.

        Returns:
            Those of the language model under `critic/lm/`, of its optimizer under `critic/`.
        """
        if not float(self._runtime.sum(torch.tensor(float(len(lessons))))):
            return {}
        rows = [row for lesson in lessons for row in _rows(lesson)] or [_idle(spare)]
        batch = collate(rows, length_limit=self._length_limit)
        rollouts = self._policy.annotate(batch, reference=False)
        rewards = torch.tensor([reward for lesson in lessons for reward in lesson.rewards])
        outcomes = torch.tensor(
            [_mean(lesson.outcomes) for lesson in lessons for _ in lesson.said.completions]
        )
        weights = torch.zeros(len(rows))
        if lessons:
            weights = above_baseline(rewards, batch.group, outcomes, self._baseline)
        credit = self._algorithm.make_credit(
            rollouts,
            weights[:, None].expand(batch.response_ids.shape),
            sum_across=self._runtime.sum,
        )
        if not lessons:
            credit = credit.counting_nothing()
        learned = self._policy.update(rollouts, credit, self._algorithm)
        # The spare row is no text of the critic's: what is seen of it is nothing to report.
        told = credit.metrics.items() if lessons else ()
        seen = {name: m for name, m in told if name.startswith("actor/")}
        return {_renamed(name): measure for name, measure in {**seen, **learned}.items()}


def _rows(lesson: Lesson) -> list[Trajectory]:
    """What was written, as responses to what was read."""
    prompt = Prompt(id="a state", token_ids=lesson.said.prompt_ids, source="")
    return [
        Trajectory(
            prompt=prompt,
            response_ids=completion.token_ids,
            action_mask=(True,) * len(completion.token_ids),
            sampler_logprobs=completion.logprobs,
            finish=completion.finish,
            group=lesson.said.group,
            reward=reward,
            policy_version=completion.policy_version,
        )
        for completion, reward in zip(lesson.said.completions, lesson.rewards, strict=True)
    ]


def _idle(prompt_ids: tuple[int, ...]) -> Trajectory:
    return Trajectory(
        prompt=Prompt(id="nothing", token_ids=prompt_ids, source=""),
        response_ids=prompt_ids[:1],
        action_mask=(True,),
        sampler_logprobs=(0.0,),
        finish=Finish.STOP,
        group=0,
        reward=0.0,
    )


def _renamed(name: str) -> str:
    """What an actor reports, told apart from the run's actor."""
    room, _, what = name.partition("/")
    return f"critic/lm/{what}" if room == "actor" else name


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
