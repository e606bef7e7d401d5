"""The trained weights on their way out: checkpoint names, adapters merged, one tensor at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmac.errors import ConfigError


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of a transformers model under the names its checkpoint would have.

    A LoRA layer comes out merged, computed when its turn comes and never written into the base:

        W' = W + Σ over active adapters of (alpha / r) · B A

    Where adapters are disabled the base comes out; a module trained in full beside the adapter
    (`modules_to_save`) comes out as trained. Tied weights come once, under the name
    `save_pretrained` keeps. The order is that of `state_dict`.

    All but merged tensors share memory with the model: copy what is to outlive the next update.
    Whoever drops each tensor before taking the next has at most one merged tensor alive.

    Args:
        model: a transformers model, plain, with a peft LoRA adapter, or wrapped in DDP.

    Raises:
        ConfigError: an adapter that is not W + scaling · B A (DoRA, quantized base, IA3, ...), or
            one that tells tied weights apart, which no checkpoint of the architecture can hold.
            Raised before the first tensor.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    entries = list(_entries(model, ""))
    # transformers' own account of what is tied: name left out of checkpoints -> name kept.
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    _check_tied({entry.name: entry for entry in entries}, tied)
    return _stream(entries, left_out=set(tied))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    tensor: Tensor
    adapters: tuple[LoraLayer, ...] = ()
    """LoRA layers that add to the tensor."""

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal for entries whose streamed tensor is the same."""
        return id(self.tensor), *map(id, self.adapters)

    def merged(self) -> Tensor:
        merged = self.tensor.detach()
        with torch.no_grad():
            for layer in self.adapters:
                for adapter in _acting(layer):
                    # All layers peft builds have it; the base class does not declare it.
                    delta: Tensor = layer.get_delta_weight(adapter)  # type: ignore[attr-defined]
                    # Added in the wider of both precisions, rounded once.
                    merged = (merged + delta).to(self.tensor.dtype)
        return merged


def _entries(module: nn.Module, prefix: str) -> Iterator[_Entry]:
    """Parameters and persistent buffers below `module`; adapters count as part of their layer."""
    if isinstance(module, LoraLayer):
        yield from _lora_entries(module, prefix)
    elif isinstance(module, ModulesToSaveWrapper):
        trained = bool(module.active_adapters) and not module.disable_adapters
        copy = module.modules_to_save[module.active_adapters[0]] if trained else None
        yield from _entries(copy if copy is not None else module.original_module, prefix)
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ConfigError(
            f"{prefix.rstrip('.')} has a {type(module).__name__} adapter, which cannot be merged "
            "into a stream of weights; use LoRA with target_modules and modules_to_save"
        )
    else:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _Entry(prefix + name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield _Entry(prefix + name, buffer)
        for name, child in module._modules.items():
            if child is not None:
                yield from _entries(child, f"{prefix}{name}.")


def _lora_entries(layer: LoraLayer, prefix: str) -> Iterator[_Entry]:
    acting = _acting(layer)
    special = [name for name in acting if name in layer.lora_variant or layer.lora_bias.get(name)]
    if special:
        raise ConfigError(
            f"{prefix.rstrip('.')} has the adapter {special[0]!r}, which is more than W + B A "
            "(DoRA or another variant, or lora_bias) and cannot be merged on the fly; "
            "use plain LoRA"
        )
    # Experts kept as one parameter are adapted by name; all other layers have a weight.
    adapted = prefix + getattr(layer, "parameter_name", "weight")
    base = layer.base_layer
    assert isinstance(base, nn.Module)
    for entry in _entries(base, prefix):
        if entry.name != adapted or not acting:
            yield entry
        elif not entry.tensor.is_floating_point():
            raise ConfigError(
                f"{entry.name} is quantized ({entry.tensor.dtype}); an adapter cannot be merged "
                "into it on the fly. Load the model in bfloat16 or float32"
            )
        else:
            yield replace(entry, adapters=(*entry.adapters, layer))


def _acting(layer: LoraLayer) -> list[str]:
    """Adapters that the layer's forward pass would add to its base."""
    if layer.disable_adapters:
        return []
    names = [name for name in layer.active_adapters if name not in layer.merged_adapters]
    return [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]


def _check_tied(entries: dict[str, _Entry], tied: dict[str, str]) -> None:
    for left_out, kept in tied.items():
        both = entries.get(left_out), entries.get(kept)
        if both[0] and both[1] and both[0].identity != both[1].identity:
            raise ConfigError(
                f"{left_out} and {kept} are tied in this architecture, but the adapter changes one "
                "without the other, and a checkpoint has room for one only. Take both out of "
                "model.lora's target_modules and modules_to_save"
            )


def _stream(entries: list[_Entry], left_out: set[str]) -> Iterator[tuple[str, Tensor]]:
    kept = {entry.identity for entry in entries if entry.name not in left_out}
    done: set[tuple[int, ...]] = set()
    for entry in entries:
        again = entry.identity in done
        if again or (entry.name in left_out and entry.identity in kept):
            continue
        done.add(entry.identity)
        yield entry.name, entry.merged()
