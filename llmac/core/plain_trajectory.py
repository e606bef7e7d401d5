"""Trajectories as plain data, for plans that remember some from step to step."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llmac.core.types import Finish, Prompt, Trajectory


def plain(trajectory: Trajectory) -> dict[str, Any]:
    """Numbers, text, tensors, and lists and dictionaries of these: what a checkpoint can hold."""
    prompt = trajectory.prompt
    return {
        "prompt": prompt.id,
        "prompt_ids": torch.tensor(prompt.token_ids, dtype=torch.int64),
        "source": prompt.source,
        "columns": dict(prompt.columns),
        "response_ids": torch.tensor(trajectory.response_ids, dtype=torch.int64),
        "action_mask": torch.tensor(trajectory.action_mask, dtype=torch.bool),
        "sampler_logprobs": torch.tensor(trajectory.sampler_logprobs, dtype=torch.float64),
        "finish": trajectory.finish.value,
        "group": trajectory.group,
        "reward": trajectory.reward,
        "reward_parts": dict(trajectory.reward_parts),
        "response_text": trajectory.response_text,
        "fresh_from": trajectory.fresh_from,
        "policy_version": trajectory.policy_version,
        "value_span": trajectory.value_span,
        "sibling_std": trajectory.sibling_std,
        "baseline_reward": trajectory.baseline_reward,
        "age": trajectory.age,
    }


def from_plain(entry: Mapping[str, Any]) -> Trajectory:
    """The trajectory of which `plain` made this.

    Where an entry lacks a field, as entries of earlier versions do, it is that of a response that
    was paused before it had a reward.
    """
    response_ids = tuple(entry["response_ids"].tolist())
    span, mask = entry.get("value_span"), entry.get("action_mask")
    return Trajectory(
        prompt=Prompt(
            id=entry["prompt"],
            token_ids=tuple(entry["prompt_ids"].tolist()),
            source=entry["source"],
            columns=entry["columns"],
        ),
        response_ids=response_ids,
        action_mask=(True,) * len(response_ids) if mask is None else tuple(mask.tolist()),
        sampler_logprobs=tuple(entry["sampler_logprobs"].tolist()),
        finish=Finish(entry.get("finish", Finish.PAUSED)),
        group=entry["group"],
        reward=entry.get("reward"),
        reward_parts=entry.get("reward_parts", {}),
        response_text=entry.get("response_text", ""),
        fresh_from=entry.get("fresh_from", 0),
        policy_version=entry.get("policy_version", 0),
        value_span=None if span is None else (span[0], span[1]),
        sibling_std=entry.get("sibling_std"),
        baseline_reward=entry.get("baseline_reward"),
        age=entry.get("age", 0),
    )


def refuse_what_cannot_be_saved(prompt: Prompt, *, kept: str) -> None:
    """Refuse a prompt that a checkpoint could not hold.

    Args:
        prompt: that is drawn now.
        kept: what is saved with it: an unfinished response, an edge that waits.

    Raises:
        ValueError: one of its columns is not plain data.
    """
    for name, value in {"prompt": prompt.source, **prompt.columns}.items():
        if not _is_plain(value):
            raise ValueError(
                f"column {name} of prompt {prompt.id} holds a {type(value).__name__}; {kept} "
                "is saved with the columns of its prompt, which may be numbers, text, and "
                "lists and dictionaries of these; turn it into text"
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value).items()
        return all(_is_plain(x) for pair in pairs for x in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(x) for x in cast("Sequence[object]", value))
    # By type, not isinstance: numpy's float64 is a float, and is saved as something else.
    return value is None or type(value) in (bool, int, float, str, bytes, Tensor)
