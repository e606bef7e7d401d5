"""A saved value model that only looks: a critic that never learns."""

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.measures import Metrics
from llmac.core.types import CriticTargets, Rollouts, Values
from llmac.critics.scatter import values_of
from llmac.models.packing import packed_micro_batches
from llmac.models.value_model import ValueModel
from llmac.runtime.context import Runtime


class FrozenCritic:
    """A `Critic` over a value model whose weights stay as they are."""

    def __init__(
        self,
        model: ValueModel,
        runtime: Runtime,
        *,
        pad_id: int,
        max_tokens_per_microbatch: int,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Take over `model`: it goes to the device and to evaluation mode.

        Args:
            model: says V of every state of a row.
            runtime: the process group.
            pad_id: any token id; padding is never looked at.
            max_tokens_per_microbatch: bound on rows x longest row.
            compute_dtype: forward passes run in it; None: in the weights' own.
        """
        self._module = runtime.freeze(model, compute_dtype=compute_dtype)
        self._runtime = runtime
        self._pad_id = pad_id
        self._max_tokens = max_tokens_per_microbatch

    @torch.no_grad()
    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`, and V(s_T) for truncated rows."""
        micro = list(
            packed_micro_batches(
                rollouts.trajectories, max_tokens=self._max_tokens, pad_id=self._pad_id
            )
        )
        seen = (self._module(packed.to(self._runtime.device)).cpu() for _, packed in micro)
        return values_of(micro, seen, rollouts, starts)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> Metrics:
        """Nothing is learned."""
        return {}
