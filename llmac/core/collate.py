"""From trajectories to tensors. Padding happens here and nowhere else."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmac.core.returns import place_outcome_rewards
from llmac.core.types import Batch, Finish, Trajectory


def collate(trajectories: Sequence[Trajectory], *, length_limit: int) -> Batch:
    """Scored trajectories as one padded batch on the CPU, rows in the order given.

    Padding is id 0, log-prob 0, reward 0 and `action_mask` False; nothing may depend on it. A
    response without tokens is a row whose mask is empty: its reward counts in group statistics
    taken from `trajectories`, and stands on no token.

    Args:
        trajectories: scored; at least one.
        length_limit: response length, tokens, at which sampling was cut.

    Returns:
        A batch as wide as the longest response, not as `length_limit`.

    Raises:
        ValueError: nothing to collate, a reward that is missing or not finite, or per-token fields
            of unequal length.

    >>> from llmac.core.types import Prompt
    >>> prompt = Prompt(id="p0", token_ids=(1,), source="?")
    >>> done = Trajectory(prompt=prompt, response_ids=(5, 6), action_mask=(True, True),
    ...                   sampler_logprobs=(-.5, -.25), finish=Finish.STOP, group=0, reward=1.0)
    >>> collate([done], length_limit=8).rewards
    tensor([[0., 1.]])
    """
    if not trajectories:
        raise ValueError("a batch needs at least one trajectory; the rollout plan returned none")
    for trajectory in trajectories:
        _check(trajectory)
    outcomes = torch.tensor([t.reward or 0.0 for t in trajectories], dtype=torch.float32)
    action_mask = _pad([t.action_mask for t in trajectories], torch.bool)
    return Batch(
        response_ids=_pad([t.response_ids for t in trajectories], torch.int64),
        action_mask=action_mask,
        rewards=place_outcome_rewards(outcomes, action_mask),
        truncated=torch.tensor([t.finish is not Finish.STOP for t in trajectories]),
        group=torch.tensor([t.group for t in trajectories]),
        sampler_logprobs=_pad([t.sampler_logprobs for t in trajectories], torch.float32),
        length_limit=length_limit,
        trajectories=tuple(trajectories),
    )


def _check(trajectory: Trajectory) -> None:
    name = f"a response to prompt {trajectory.prompt.id}"
    if trajectory.reward is None and trajectory.finish is not Finish.PAUSED:
        raise ValueError(f"{name} has no reward; score trajectories before collating them")
    if trajectory.reward is not None and not math.isfinite(trajectory.reward):
        raise ValueError(f"{name} has reward {trajectory.reward}; a reward is a finite number")
    lengths = (
        len(trajectory.response_ids),
        len(trajectory.action_mask),
        len(trajectory.sampler_logprobs),
    )
    if len(set(lengths)) != 1:
        raise ValueError(
            f"{name} has {lengths[0]} token ids, {lengths[1]} mask entries and {lengths[2]} "
            "log-probs; each token has one of each"
        )


def _pad(rows: Sequence[Sequence[int | float | bool]], dtype: torch.dtype) -> Tensor:
    padded = torch.zeros(len(rows), max(len(row) for row in rows), dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=dtype)
    return padded
