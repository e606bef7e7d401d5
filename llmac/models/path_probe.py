"""Whether a model that follows paths says of rows in a trie what it says of padded rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from llmac.core.types import Finish, Prompt, Trajectory
from llmac.errors import ConsistencyError
from llmac.models.packing import PackedRows, Packing, pack, pack_along_paths
from llmac.models.tree_attention import find_out, follows_paths, found_out, name_of

_ROWS = (((1, 2), (3, 4, 5)), ((1, 2), (3, 6)), ((2,), (1, 2, 3)))


class PathProbe:
    """Shows a model small rows both ways before it reads its first ones."""

    def __init__(self) -> None:
        """Of a model that nothing is known of."""
        self._done = False

    def __call__(
        self,
        model: nn.Module,
        rows: PackedRows,
        hidden_of: Callable[[PackedRows], Tensor],
        *,
        vocabulary: int,
    ) -> None:
        """To be called first in every forward pass: outside of it a sharded model lacks its weights.

        A model that is prepared is probed whatever its rows are: those of other ranks may be packed otherwise, and all
        must take part. One that fails is as it was before `follow_paths`.

        Args:
            model: in training or not; dropout is off meanwhile.
            rows: what it is about to read.
            hidden_of: its hidden vectors of packed rows, flattened.
            vocabulary: tokens it knows.

        Raises:
            ConsistencyError: `rows` go along paths, and the model overlooks them.
        """
        if not self._done and (rows.paths is not None or follows_paths(model)):
            self._done = True
            reason = _fault(model, hidden_of, rows.input_ids.device, vocabulary)
            if reason is not None:
                find_out(model, reason)
        reason = found_out(model)
        if rows.paths is not None and reason is not None:
            raise ConsistencyError(
                f"{name_of(model)} cannot read rows that share their prefixes: {reason}; set actor.packing: padded"
            )


class Ranks(Protocol):
    """All ranks of a run, and where this one's models are."""

    device: torch.device
    """Of this rank."""

    def max(self, number: float) -> float:
        """The largest of all ranks."""
        ...


def settled(
    packing: Packing,
    models: Sequence[nn.Module],
    ask: Callable[[PackedRows], object],
    ranks: Ranks,
) -> Packing:
    """The same packing, unless it is automatic and a model turns out to overlook paths: then a padded one.

    Collective: what one rank finds out holds for all.

    Args:
        packing: it is `fitting`.
        models: those that read its rows.
        ask: calls them all with padded rows, in the form in which they are used.
        ranks: a `Runtime`.
    """
    if packing.kind != "auto":
        return packing
    ask(pack([_row((0,), (0,), 1)], pad_id=packing.pad_id).to(ranks.device))
    for model in models:
        if ranks.max(float(not follows_paths(model))) > 0:
            find_out(model, found_out(model) or "another rank found out that it overlooks them")
    return packing.fitting(*models, device=ranks.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode; afterwards as it was."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@torch.no_grad()
def _fault(
    model: nn.Module,
    hidden_of: Callable[[PackedRows], Tensor],
    device: torch.device,
    vocabulary: int,
) -> str | None:
    """How its hidden vectors of rows along paths are wrong; None: they are those of padded rows."""
    rows = [_row(prompt, response, vocabulary) for prompt, response in _ROWS]
    with evaluating(model):
        plain, shared = pack(rows, pad_id=0).to(device), pack_along_paths(rows, pad_id=0).to(device)
        padded = hidden_of(plain)[plain.states].float()
        try:
            along = hidden_of(shared)[shared.states].float()
        except Exception as problem:  # whatever architectures raise that do not know of paths
            return f"{type(problem).__name__}: {problem}"
    # Whatever it computes in: a model that overlooks the paths is off by as much as the vectors are long.
    gap = float((padded - along).norm() / padded.norm().clamp(min=1e-30))
    if gap <= _tolerance(model, device):
        return None
    return f"its hidden vectors are off by {gap:.2g} of their length"


def _tolerance(model: nn.Module, device: torch.device) -> float:
    autocast = torch.is_autocast_enabled(device.type)
    return 5e-2 if autocast or next(model.parameters()).dtype != torch.float32 else 1e-3


def _row(prompt: tuple[int, ...], response: tuple[int, ...], vocabulary: int) -> Trajectory:
    return Trajectory(
        prompt=Prompt(id="probe", token_ids=tuple(t % vocabulary for t in prompt), source=""),
        response_ids=tuple(t % vocabulary for t in response),
        action_mask=(True,) * len(response),
        sampler_logprobs=(0.0,) * len(response),
        finish=Finish.STOP,
        group=0,
    )
