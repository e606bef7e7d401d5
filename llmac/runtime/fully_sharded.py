"""PyTorch's FSDP2: weights, gradients and optimizer cut along their first dimension, gathered layer by layer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from llmac.errors import CheckpointError
from llmac.runtime.trained import OptimizerOf, clipped_step

_FOLDER = "shards"
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class FullShard:
    """FSDP2 over all ranks."""

    def __init__(self, *, world_size: int, device: torch.device) -> None:
        """Make the group of ranks."""
        self._mesh: DeviceMesh = init_device_mesh(device.type, (world_size,))

    def train(
        self, module: nn.Module, optimizer_of: OptimizerOf, *, max_norm: float
    ) -> "FullySharded":
        """Cut `module`, then build its optimizer over the shards."""
        self._cut(module)
        return FullySharded(module, optimizer_of(module), max_norm=max_norm)

    def freeze(self, module: nn.Module) -> nn.Module:
        """A module that only looks, cut as well."""
        self._cut(module)
        return module

    def _cut(self, module: nn.Module) -> None:
        """A group of parameters for each transformer block, one for what is outside of them.

        Gathered weights are given back after every forward pass, the outermost group's too: between passes a module
        holds nothing but its shards, which is what the weight stream and the optimizer expect.
        """
        blocks = _block_names(module)
        for part in module.modules():
            if type(part).__name__ in blocks:
                fully_shard(part, mesh=self._mesh, reshard_after_forward=True)
        for part in module.children():
            # FSDP wants one precision a group: a float32 head beside a bfloat16 trunk is a group of its own.
            if not _block_names(part):
                fully_shard(part, mesh=self._mesh, reshard_after_forward=True)
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True)


class FullySharded:
    """A `Trained` module under FSDP2."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, max_norm: float) -> None:
        """Take a module that `FullShard` has cut."""
        self._max_norm = max_norm
        self.inner = module
        self.learning = module
        self.looking = module
        self._optimizer = optimizer

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        """Nothing to do: gradients are reduced to shards in every micro-batch, so none is ever held whole."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the shards of the gradient."""
        loss.backward()

    def step(self, *, lr: float) -> Tensor:
        """Clip, update, forget the gradients; returns the norm before clipping."""
        return clipped_step(self.inner, self._optimizer, lr=lr, max_norm=self._max_norm)

    def save(self, directory: Path) -> None:
        """Shards in PyTorch's distributed format, which any number of ranks can read."""
        state_dict_saver.save(self._state(), checkpoint_id=directory / _FOLDER)

    def load(self, directory: Path) -> None:
        """Read the shards this rank needs."""
        if not (directory / _FOLDER / ".metadata").is_file():
            raise CheckpointError(
                f"{directory} was not saved under FSDP; launch with the accelerate configuration it was saved under, "
                "or start from its final/ folder"
            )
        state = self._state()
        state_dict_loader.load(state, checkpoint_id=directory / _FOLDER)
        set_state_dict(
            self.inner,
            self._optimizer,
            model_state_dict=state["module"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )

    def _state(self) -> dict[str, Any]:
        module, optimizer = get_state_dict(self.inner, self._optimizer, options=_OPTIONS)
        return {"module": module, "optimizer": optimizer}


def _block_names(module: nn.Module) -> set[str]:
    """Class names of the transformer blocks, as transformers' models declare them."""
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    return names
