"""Names and layouts of checkpoints, where transformers keeps a module's weights in another form.

A mixture of experts has one tensor for all experts of a layer in memory and one per expert in its checkpoint. The rules
are transformers' own, those of `save_pretrained`; here they are looked up once and applied to a few tensors at a time.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Tensors of a module that become tensors of its checkpoint together, and only together."""

    name: str
    """In the checkpoint; the first of several."""
    sources: tuple[str, ...]
    """In the module."""
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None
    """None: one tensor, which only changes its name, if that."""

    def __call__(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The checkpoint's tensors, from the module's by name; may share memory with them."""
        if self.converter is None:
            return {self.name: tensors[self.sources[0]]}
        converter = deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            # Takes tensors as well as the futures it is annotated with.
            converter.add_tensor(self.name, source, pattern, tensors[source])  # type: ignore[arg-type]
        found = converter.convert(self.name, model=model, config=getattr(model, "config", None))
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


def conversions(model: nn.Module, names: Iterable[str]) -> list[Conversion]:
    """How the tensors `names` of a module are written to a checkpoint, in the order of their first names."""
    names = list(names)
    reverse = _reverse_transforms(model) if isinstance(model, PreTrainedModel) else []
    if not reverse:
        return [Conversion(name=name, sources=(name,)) for name in names]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    together: dict[str, list[tuple[str, str | None]]] = {}
    # In this order because some rules remember which names they have seen.
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
        together.setdefault(renamed, []).append((name, pattern))
    place = {name: index for index, name in enumerate(names)}
    return sorted(
        (_conversion(renamed, sources, by_pattern) for renamed, sources in together.items()),
        key=lambda conversion: min(place[source] for source in conversion.sources),
    )


def _conversion(
    renamed: str,
    sources: list[tuple[str, str | None]],
    by_pattern: dict[str, WeightConverter],
) -> Conversion:
    names = tuple(name for name, _ in sources)
    patterns = tuple(pattern for _, pattern in sources if pattern is not None)
    if not patterns:
        return Conversion(name=renamed, sources=names)
    return Conversion(
        name=renamed, sources=names, patterns=patterns, converter=by_pattern[patterns[0]]
    )


def _reverse_transforms(model: PreTrainedModel) -> list[WeightTransform]:
    """From memory to checkpoint: what undoes `from_pretrained`, or what it would do to this architecture."""
    # Set by `from_pretrained` only, to what it did.
    forward: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if forward is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        # Whether a checkpoint has the prefix is known only of one that was loaded.
        forward = [entry for entry in known if not isinstance(entry, PrefixChange)]
    return [entry.reverse_transform() for entry in reversed(forward)]
