"""Whether a model that follows paths says of rows in a trie what it says of padded rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmac.core.types import Finish, Prompt, Trajectory
from llmac.errors import ConsistencyError
from llmac.models.packing import PackedRows, pack, pack_along_paths

_ROWS = (((1, 2), (3, 4, 5)), ((1, 2), (3, 6)), ((2,), (1, 2, 3)))


@torch.no_grad()
def check_paths(
    model: nn.Module,
    hidden_of: Callable[[PackedRows], Tensor],
    device: torch.device,
    *,
    vocabulary: int,
) -> None:
    """Show a model three small rows both ways.

    To be called inside a forward pass, where a sharded model has its weights, on all ranks.

    Args:
        model: in training or not; dropout is off meanwhile.
        hidden_of: its hidden vectors of packed rows, flattened.
        device: where it is.
        vocabulary: tokens it knows.

    Raises:
        ConsistencyError: the vectors differ by more than rounding.
    """
    rows = [_row(prompt, response, vocabulary) for prompt, response in _ROWS]
    with evaluating(model):
        padded, along = (
            hidden_of(packed)[packed.states].float()
            for packed in (
                pack(rows, pad_id=0).to(device),
                pack_along_paths(rows, pad_id=0).to(device),
            )
        )
    # Whatever it computes in: a model that overlooks the paths is off by as much as the vectors are long.
    gap = float((padded - along).norm() / padded.norm().clamp(min=1e-30))
    if not gap <= _tolerance(model):
        raise ConsistencyError(
            f"{type(model).__name__} says something else of rows that share their prefixes than of padded rows: its "
            f"hidden vectors differ by {gap:.2g} of their length; set actor.packing: padded"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode; afterwards as it was."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _tolerance(model: nn.Module) -> float:
    low = torch.is_autocast_enabled() or next(model.parameters()).dtype != torch.float32
    return 5e-2 if low else 1e-3


def _row(prompt: tuple[int, ...], response: tuple[int, ...], vocabulary: int) -> Trajectory:
    return Trajectory(
        prompt=Prompt(id="probe", token_ids=tuple(t % vocabulary for t in prompt), source=""),
        response_ids=tuple(t % vocabulary for t in response),
        action_mask=(True,) * len(response),
        sampler_logprobs=(0.0,) * len(response),
        finish=Finish.STOP,
        group=0,
    )
