"""Values that the plan knew already: of both ends of each row."""

import torch

from llmac.core.segments import response_start
from llmac.core.types import Rollouts, Values


def span_values(rollouts: Rollouts) -> Values:
    """One segment a row, from its first own token to its end, with the values the plan gave both ends.

        V(s_f) = value_span[0]          V(s_T) = value_span[1] if the row goes on elsewhere, else 0

    With `segment_gae` at λ = 0 an inner edge of a tree has V(end) - V(start), and a leaf its reward minus V(start).

    Args:
        rollouts: rows with `value_span`, `fresh_from` (f) and `finish`.

    Raises:
        ValueError: a row without `value_span`.

    >>> from llmac.core.collate import collate
    >>> from llmac.core.types import Finish, Prompt, Trajectory
    >>> edge = Trajectory(prompt=Prompt(id="p0", token_ids=(1,), source="?"), response_ids=(5, 6, 7), group=0,
    ...                   action_mask=(True,) * 3, sampler_logprobs=(0.0,) * 3, finish=Finish.PAUSED,
    ...                   fresh_from=1, value_span=(0.25, 0.75))
    >>> batch = collate([edge], length_limit=8)
    >>> values = span_values(Rollouts.of(batch, old_logprobs=batch.sampler_logprobs))
    >>> values.at, values.bootstrap
    (tensor([[0.0000, 0.2500, 0.0000]]), tensor([0.7500]))
    """
    unknown = [t for t in rollouts.trajectories if t.value_span is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(rollouts.trajectories)} rows, the first a response to prompt "
            f"{unknown[0].prompt.id}, do not say what their ends are worth; only a plan that samples trees knows that"
        )
    spans = torch.tensor(
        [t.value_span for t in rollouts.trajectories], dtype=rollouts.rewards.dtype
    )
    starts = response_start(rollouts.action_mask & rollouts.fresh)
    return Values(at=spans[:, :1] * starts, starts=starts, bootstrap=spans[:, 1] * rollouts.paused)
