"""Proof that an engine survives a sleep of level 2, which discards its weights.

What a checkpoint holds is sent again; what it does not hold (tables computed when the model was built, scales, matrices
derived from weights) must be kept or computed anew by the engine. For some architectures it was not: the engine went on
and sampled from noise. So the first sleep is a rehearsal: everything is discarded and sent again, and one prompt must
be answered as before.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmac.engines.readiness import Memory
from llmac.errors import EngineError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Greatest |log μ after - log μ before| of a token: the same weights in the same kernels, so rounding at most."""


class Sleeper(Memory, Protocol):
    """An engine that holds one model; `vllm.LLM` is one."""

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        """Run a function on the model."""
        ...

    def collective_rpc(self, method: str) -> object:
        """Run a method of the worker by name."""
        ...


def survives_discarding(engine: Sleeper, probe: Callable[[], Sequence[float]]) -> bool:
    """Whether level 2 leaves the engine as it was; after the answer the engine is as it was.

    Parameters are zeroed before they are sent again, so that memory which happens to keep its content proves nothing.

    Args:
        engine: awake, with the weights of its checkpoint, which it can load again by itself.
        probe: log-probabilities of a greedy answer by the engine; every rank that shares the engine calls it.

    Raises:
        EngineError: it does not survive, and could not be brought back either.
    """
    before = probe()
    outside = engine.apply_model(_tensors_outside_checkpoints)
    engine.sleep(2)
    engine.wake_up(["weights"])
    engine.apply_model(_zero_parameters)
    engine.collective_rpc("reload_weights")
    engine.wake_up(["kv_cache"])
    if _agree(before, probe()):
        return True
    for kept in outside:
        engine.apply_model(lambda model, kept=kept: _put_back(model, kept))
    if _agree(before, after := probe()):
        return False
    raise EngineError(
        f"the engine did not come back from a sleep of level 2: a greedy answer has log-probabilities {list(after)}, "
        f"before it had {list(before)}. Set rollout.sleep_level=1"
    )


def _agree(before: Sequence[float], after: Sequence[float]) -> bool:
    # A greedy answer that changed may be shorter; a comparison with NaN is false.
    return len(before) == len(after) and all(
        abs(a - b) <= TOLERANCE for a, b in zip(before, after, strict=True)
    )


def _tensors_outside_checkpoints(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Copies in main memory of buffers and of tensors that are plain attributes, by module and name."""
    return {place: tensor.to("cpu", copy=True) for place, tensor in _outside(model).items()}


def _outside(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    found = {}
    for path, module in model.named_modules():
        attributes = {**module._buffers, **vars(module)}
        for name, value in attributes.items():
            # Keys and values are attributes of attention layers, and start empty after every sleep.
            if isinstance(value, Tensor) and name != "kv_cache":
                found[path, name] = value
    return found


def _put_back(model: nn.Module, kept: dict[tuple[str, str], Tensor]) -> None:
    now = _outside(model)
    with torch.no_grad():
        for place, tensor in kept.items():
            if place in now:
                now[place].copy_(tensor)


def _zero_parameters(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.zero_()
