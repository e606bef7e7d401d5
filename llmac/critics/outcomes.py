"""What responses earned: by response, by prompt, and as a value that is the same for all of a response."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.calibration import ranking_auc, variance_explained
from llmac.core.masking import masked_mean
from llmac.core.measures import Last, Mean, Metrics
from llmac.core.types import Prompt, Rollouts, Values
from llmac.core.value_heads import OUTSIDE, inside
from llmac.runtime.context import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOutcome:
    """What one prompt's responses of a step earned, on all ranks."""

    prompt: Prompt
    """Without its columns."""
    mean: float
    """Outcome of a response, in reward units."""
    responses: int


def outcomes(rollouts: Rollouts) -> tuple[Float[Tensor, "B"], Bool[Tensor, "B"]]:
    """The sum of each response's rewards, and whether it is known: paused responses have none yet.

    A response without tokens has no place for its reward in [B, T]; it is taken from its trajectory.
    """
    rewards = [0.0 if t.reward is None else t.reward for t in rollouts.trajectories]
    known = torch.tensor([t.reward is not None for t in rollouts.trajectories], dtype=torch.bool)
    total = rollouts.rewards.sum(-1)
    empty = ~rollouts.action_mask.any(-1)
    return torch.where(empty, total.new_tensor(rewards), total), known


def mean_outcome(rollouts: Rollouts, runtime: Runtime) -> float | None:
    """Of all responses of the step that have one, on all ranks; None if none has. Collective.

    Where a critic that knows nothing yet starts.
    """
    total, known = outcomes(rollouts)
    if not float(runtime.sum(known.sum())):
        return None
    return float(masked_mean(total, known, sum_across=runtime.sum))


def prompt_outcomes(rollouts: Rollouts, runtime: Runtime) -> list[PromptOutcome]:
    """One for each prompt that has an outcome, the same on all ranks. Collective."""
    total, known = outcomes(rollouts)
    mine: dict[str, tuple[Prompt, float, int]] = {}
    for trajectory, outcome, counts in zip(
        rollouts.trajectories, total.tolist(), known.tolist(), strict=True
    ):
        if counts:
            prompt = dataclasses.replace(trajectory.prompt, columns={})
            _, earned, responses = mine.get(prompt.id, (prompt, 0.0, 0))
            mine[prompt.id] = prompt, earned + outcome, responses + 1
    everyone: dict[str, tuple[Prompt, float, int]] = {}
    for part in runtime.gather(mine):
        for name, (prompt, earned, responses) in part.items():
            _, before, count = everyone.get(name, (prompt, 0.0, 0))
            everyone[name] = prompt, before + earned, count + responses
    return [
        PromptOutcome(prompt=prompt, mean=earned / responses, responses=responses)
        for prompt, earned, responses in everyone.values()
    ]


def remaining(
    expected: Float[Tensor, "B"], rollouts: Rollouts, starts: Bool[Tensor, "B T"]
) -> Values:
    """Values of a critic that expects the same outcome all along a response: what is still to come.

        V(s_t) = expected - Σ_{k<t} r_k

    With the whole reward on the last token that is `expected` everywhere.

    Args:
        expected: outcome of each row.
        rollouts: the rows.
        starts: where V is asked.
    """
    earned = rollouts.rewards.cumsum(1)
    at = expected[:, None].to(earned.dtype) - (earned - rollouts.rewards)
    bootstrap = (expected - earned[:, -1]) if earned.shape[1] else expected
    return Values(
        at=at * starts, starts=starts, bootstrap=bootstrap.to(earned.dtype) * rollouts.truncated
    )


def foresight(
    predicted: Float[Tensor, "N"], found: Sequence[PromptOutcome], reward_range: tuple[float, float]
) -> Metrics:
    """How well a step's prompts were known before it, each weighed by its responses.

    Ranking *within* a step: a critic that knows only how good the policy is by now has an AUC of .5.

    Args:
        predicted: value of each prompt, said before its responses were seen.
        found: what the responses earned.
        reward_range: smallest and largest outcome.

    Returns:
        `critic/prompt_auc` and `critic/prompt_explained_var`; without those that are undefined,
        because all prompts have the same outcome.
    """
    low, high = reward_range
    truth = torch.tensor([entry.mean for entry in found])
    weight = torch.tensor([float(entry.responses) for entry in found])
    solved = ((truth - low) / (high - low)).clamp(0.0, 1.0)
    predicted = predicted.to(truth.dtype)
    same_step = torch.zeros(len(found), dtype=torch.long)
    metrics = {
        "critic/prompt_auc": Last(
            float(ranking_auc(predicted, solved, 1 - solved, same_step, weight))
        ),
        "critic/prompt_explained_var": Last(float(variance_explained(predicted, truth, weight))),
    }
    return {name: last for name, last in metrics.items() if not math.isnan(last.value)}


def outside_range(found: Sequence[PromptOutcome], reward_range: tuple[float, float]) -> Metrics:
    """How many responses are to prompts that count as an end of the range, because their outcome is beyond it.

    Args:
        found: what the responses earned, the same on all ranks.
        reward_range: smallest and largest outcome.
    """
    responses = torch.tensor([[float(entry.responses) for entry in found]])
    _, beyond = inside(torch.tensor([[entry.mean for entry in found]]), *reward_range)
    return {OUTSIDE: Mean(float(responses[beyond].sum()), float(responses.sum()))}
