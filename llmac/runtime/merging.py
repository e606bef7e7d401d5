"""What a module's weights are once its adapters act: the base, plus what LoRA adds, or the copy that is trained."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from llmac.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter or saved buffer of the model as it acts."""

    name: str
    """Without the words that adapters put into it."""
    tensor: Tensor
    """The base; possibly this rank's shard of it."""
    adapters: tuple[LoraLayer, ...] = ()
    """LoRA layers that add to the tensor."""

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal for entries whose weight is the same."""
        return id(self.tensor), *map(id, self.adapters)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is needed to compute the weight."""
        return [self.tensor, *(t for layer in self.adapters for t in _factors(layer))]

    def weight(self, whole: Mapping[int, Tensor]) -> Tensor:
        """W, or W + Σ (alpha / r) · B A as a new tensor.

        Args:
            whole: by `id`, what to compute with in place of those of `tensors` that are shards.
        """
        base = whole.get(id(self.tensor), self.tensor).detach()
        total = base
        with torch.no_grad():
            for layer in self.adapters:
                assert isinstance(layer, nn.Module)
                stand_in = _stand_in(layer, whole)
                for adapter in acting(layer):
                    # All layers peft builds have it; the base class does not declare it.
                    delta: Tensor = stand_in.get_delta_weight(adapter)  # type: ignore[attr-defined]
                    wide = torch.promote_types(delta.dtype, total.dtype)
                    # Added in the wider of both precisions, rounded once.
                    total = (delta.add_(total) if wide == delta.dtype else delta + total).to(
                        base.dtype
                    )
        return total


def entries(module: nn.Module, prefix: str = "") -> Iterator[Entry]:
    """Parameters and persistent buffers of `module`, in the order of `state_dict`.

    Raises:
        ConfigError: an adapter that is not W + scaling · B A.
    """
    if isinstance(module, LoraLayer):
        yield from _lora_entries(module, prefix)
    elif isinstance(module, ModulesToSaveWrapper):
        trained = bool(module.active_adapters) and not module.disable_adapters
        copy_ = module.modules_to_save[module.active_adapters[0]] if trained else None
        yield from entries(copy_ if copy_ is not None else module.original_module, prefix)
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ConfigError(
            f"{prefix.rstrip('.')} has a {type(module).__name__} adapter, which cannot be merged "
            "into a stream of weights; use LoRA with target_modules and modules_to_save"
        )
    else:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Entry(prefix + name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield Entry(prefix + name, buffer)
        for name, child in module._modules.items():
            if child is not None:
                yield from entries(child, f"{prefix}{name}.")


def acting(layer: LoraLayer) -> list[str]:
    """Adapters that the layer's forward pass would add to its base."""
    if layer.disable_adapters:
        return []
    names = [name for name in layer.active_adapters if name not in layer.merged_adapters]
    return [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]


def _lora_entries(layer: LoraLayer, prefix: str) -> Iterator[Entry]:
    names = acting(layer)
    special = [name for name in names if name in layer.lora_variant or layer.lora_bias.get(name)]
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
    for entry in entries(base, prefix):
        if entry.name != adapted or not names:
            yield entry
        elif not entry.tensor.is_floating_point():
            raise ConfigError(
                f"{entry.name} is quantized ({entry.tensor.dtype}); an adapter cannot be merged "
                "into it on the fly. Load the model in bfloat16 or float32"
            )
        else:
            yield replace(entry, adapters=(*entry.adapters, layer))


def _factors(layer: LoraLayer) -> Iterator[Tensor]:
    """A and B of the acting adapters."""
    for name in acting(layer):
        for linear in (layer.lora_A, layer.lora_B):
            if name in linear:
                yield from linear[name].parameters()
        for embedding in (layer.lora_embedding_A, layer.lora_embedding_B):
            if name in embedding:
                yield embedding[name]


def _stand_in(module: nn.Module, whole: Mapping[int, Tensor]) -> nn.Module:
    """A shallow copy of `module` that computes with whole tensors where it holds shards."""
    if not whole:
        return module
    twin = copy.copy(module)
    twin._parameters = {  # type: ignore[assignment]  # tensors do for computing
        name: None if value is None else whole.get(id(value), value)
        for name, value in module._parameters.items()
    }
    twin._modules = {
        name: None if child is None else _stand_in(child, whole)
        for name, child in module._modules.items()
    }
    return twin
