"""Whole models out of shards: folders that `from_pretrained` loads, written by rank 0 with everybody's help."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llmac.runtime.weights import full_weights


def save_whole(model: nn.Module, directory: Path, *, is_main: bool) -> None:
    """Write a `save_pretrained` folder of the whole model, adapters merged in. Collective.

    Rank 0 needs main memory for all weights.

    Args:
        model: a transformers model, with or without a peft adapter, in whatever form it is trained.
        directory: made if missing.
        is_main: whether this rank writes.
    """
    weights = whole_weights(model, keep=is_main)
    if not is_main:
        return
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(bare, PreTrainedModel)
    # The stream has the checkpoint's names already.
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    empty = _empty_like(bare)
    nn.Module.to(empty, dtype=dtype)
    if bare.can_generate():  # also what only the checkpoint's generation_config.json says
        empty.generation_config = bare.generation_config
    empty.save_pretrained(
        directory, state_dict=weights, save_original_format=False, max_shard_size="5GB"
    )


def save_adapter(model: PeftModel, directory: Path, *, is_main: bool) -> None:
    """Write the adapters by themselves, as `PeftModel.from_pretrained` loads them. Collective."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _fetched(list(learned.values())):
        state = {name: _whole(p).to("cpu", copy=True) for name, p in learned.items()}
    if is_main:
        model.save_pretrained(
            str(directory), state_dict=get_peft_model_state_dict(model, state_dict=state)
        )


def whole_weights(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The full weights of any module in main memory, {} unless `keep`. Collective."""
    weights = {}
    for name, tensor in full_weights(module):
        if keep:
            weights[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return weights


def _fetched(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, parameters that ZeRO-3 has cut are whole. Adapters are small: all at once."""
    cut = [p for p in parameters if hasattr(p, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut)


def _whole(parameter: nn.Parameter) -> Tensor:
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data


def _empty_like(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without memory for its weights."""
    kind = type(model)
    if issubclass(kind, FSDPModule):  # FSDP2 puts its own class in front
        kind = next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        return kind(model.config)
