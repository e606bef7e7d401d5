"""A module in training: how its gradients, weights and optimizer are spread over the ranks.

`Trained` is what a `Learner` holds. `Replicated` keeps everything on every rank; `zero.py` and `fully_sharded.py` cut
it into shards.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from llmac.errors import CheckpointError

OptimizerOf = Callable[[nn.Module], Optimizer]
"""Builds the optimizer over a module's trainable parameters, in whatever form they are by then."""


class Trained(Protocol):
    """One module and its optimizer. All ranks call the same methods in the same order."""

    @property
    def inner(self) -> nn.Module:
        """The module itself, under its own parameter names; its parameters may be shards."""
        ...

    @property
    def learning(self) -> nn.Module:
        """What to call when `backward` follows."""
        ...

    @property
    def looking(self) -> nn.Module:
        """What to call without gradients."""
        ...

    def accumulate(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `sync` for the last of a minibatch only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; over all ranks, gradients end up *averaged*."""
        ...

    def step(self, *, lr: float) -> Tensor:
        """Clip to the module's global L2 norm, update, forget the gradients; returns the norm before clipping.

        When the norm is not finite no weight changes, on any rank; whoever calls decides what that means.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write what learns, and the optimizer."""
        ...

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CheckpointError: it is of another module, or cut for another number of ranks.
        """
        ...


class Replicated:
    """Weights, gradients and optimizer whole on every rank; gradients averaged by DDP where there are several."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, max_norm: float, is_main: bool
    ) -> None:
        """Take a module that `Runtime.train` has prepared.

        Args:
            module: plain, or in DDP.
            optimizer: over its parameters.
            max_norm: gradients are clipped to this norm.
            is_main: whether this rank writes checkpoints.
        """
        self.learning = module
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._is_main = is_main

    @property
    def inner(self) -> nn.Module:
        """The module as it was before DDP."""
        wrapped = self.learning
        return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped

    @property
    def looking(self) -> nn.Module:
        """The module itself: DDP would add a collective to a forward pass that needs none."""
        return self.inner

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        """Without `sync` gradients stay on this rank and add up; the last micro-batch carries them with it."""
        if sync or not isinstance(self.learning, DistributedDataParallel):
            yield
        else:
            with self.learning.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; in a micro-batch with `sync`, average them over ranks as well."""
        loss.backward()

    def step(self, *, lr: float) -> Tensor:
        """Clip, update, forget the gradients; returns the norm before clipping."""
        return clipped_step(self.inner, self._optimizer, lr=lr, max_norm=self._max_norm)

    def save(self, directory: Path) -> None:
        """One file, written by rank 0."""
        if self._is_main:
            torch.save(
                {
                    "module": trainable_state(self.inner),
                    "optimizer": self._optimizer.state_dict(),
                },
                directory / "learner.pt",
            )

    def load(self, directory: Path) -> None:
        """Read `save`'s file on every rank."""
        path = directory / "learner.pt"
        if not path.is_file():
            raise CheckpointError(
                f"{directory} was saved by a sharded run; launch with the accelerate configuration it was saved under, "
                "or start from its final/ folder"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = self.inner.load_state_dict(state["module"], strict=False)
        wanted = {name for name, p in self.inner.named_parameters() if p.requires_grad}
        lost = sorted(wanted.intersection(missing)) + sorted(unexpected)
        if lost:
            raise CheckpointError(f"{directory} does not fit the module: {lost[:5]}")
        self._optimizer.load_state_dict(state["optimizer"])


def clipped_step(module: nn.Module, optimizer: Optimizer, *, lr: float, max_norm: float) -> Tensor:
    """Clip, update unless the norm is not finite, forget the gradients; returns the norm before clipping, 0-d.

    Args:
        module: whole, or sharded by FSDP2.
        optimizer: over its parameters.
        lr: for all of them.
        max_norm: of the gradients of all ranks together.
    """
    set_learning_rate(optimizer, lr)
    norm = clip_grad_norm(module, max_norm)
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """The same learning rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_grad_norm(module: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients to a joint L2 norm of at most `max_norm`; returns the norm before, 0-d.

    A norm that is not finite is returned with the gradients left as they are: scaling would make all of them NaN and
    hide where it began.

    Args:
        module: whose gradients, whole or sharded; parameters without one are skipped.
        max_norm: `math.inf` only measures.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if parameters and torch.isfinite(norm):
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.detach()


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn, and buffers; a frozen base is loaded from where it came from."""
    trained = {
        name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False)} - trained
    return {name: t for name, t in module.state_dict().items() if name not in frozen}
