"""A copy of a value model that follows it slowly: whoever bootstraps from it does not chase itself."""

import copy
from typing import Any

import torch
from torch import Tensor

from llmac.errors import CheckpointError
from llmac.models.value_model import HiddenStates, ValueModel
from llmac.runtime.context import Runtime
from llmac.runtime.trained import trainable_state


class TargetNetwork:
    """Polyak averaging of what learns: θ' ← (1 - τ) · θ' + τ · θ after every optimizer step.

    Lillicrap et al. 2016, arXiv:1509.02971. Kept in float32 whatever the model is kept in: a step of τ would be
    rounded away.
    """

    def __init__(
        self,
        model: ValueModel,
        runtime: Runtime,
        *,
        tau: float,
        states: HiddenStates | None,
        compute_dtype: torch.dtype | None,
    ) -> None:
        """Copy a model that is not yet in training.

        Args:
            model: what to follow.
            runtime: the process group; nothing may be sharded.
            tau: τ.
            states: as the model has it; a borrowed trunk is not copied.
            compute_dtype: of forward passes.
        """
        self._tau = tau
        self._learns = [name for name, p in model.named_parameters() if p.requires_grad]
        own = states is None
        self.model = (
            copy.deepcopy(model) if own else model.copy_on(model.backbone, states=states)
        ).float()
        self.module = runtime.freeze(self.model, compute_dtype=compute_dtype)

    @torch.no_grad()
    def follow(self, model: ValueModel) -> None:
        """One step towards the model."""
        theirs = dict(model.named_parameters())
        for name, own in self.model.named_parameters():
            if name in self._learns:
                own.lerp_(theirs[name].to(own), self._tau)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs."""
        wanted = {*self._learns, *dict(self.model.named_buffers())}
        state: dict[str, Any] = self.model.state_dict()
        return {name: tensor.cpu() for name, tensor in state.items() if name in wanted}

    def restore(self, state: dict[str, Tensor], model: ValueModel) -> None:
        """Continue from `state()`, or from the model's own weights where a checkpoint has none.

        Raises:
            CheckpointError: it is of another model.
        """
        found = state or trainable_state(model)
        lost = sorted(set(self._learns) - set(found))
        if lost:
            raise CheckpointError(f"the target network in the checkpoint lacks {lost[:3]}")
        self.model.load_state_dict(found, strict=False)
