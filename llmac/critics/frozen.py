"""A saved value model that only looks: a critic that never learns."""

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.measures import Metrics
from llmac.core.types import CriticTargets, Rollouts, Values
from llmac.critics.scatter import values_of
from llmac.models.packing import Packing
from llmac.models.path_probe import settled
from llmac.models.value_model import ValueModel
from llmac.runtime.context import Runtime


class FrozenCritic:
    """A `Critic` over a value model whose weights stay as they are."""

    def __init__(
        self,
        model: ValueModel,
        runtime: Runtime,
        *,
        packing: Packing,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Take over `model`: it goes to the device and to evaluation mode.

        Args:
            model: says V of every state of a row.
            runtime: the process group.
            packing: how rows become inputs; padded if the model cannot read them so.
            compute_dtype: forward passes run in it; None: in the weights' own.
        """
        fitting = packing.fitting(model.backbone, device=runtime.device)
        self._module = runtime.freeze(model, compute_dtype=compute_dtype)
        ask = torch.no_grad()(self._module)
        self._packing = settled(fitting, [model.backbone], ask, runtime)
        self._runtime = runtime

    @torch.no_grad()
    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`, and V(s_T) for truncated rows."""
        micro = list(self._packing.packed(rollouts.trajectories))
        seen = (self._module(packed.to(self._runtime.device)).cpu() for _, packed in micro)
        return values_of(micro, seen, rollouts, starts)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> Metrics:
        """Nothing is learned."""
        return {}
