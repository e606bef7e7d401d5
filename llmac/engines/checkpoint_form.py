"""A model's checkpoint as its module sees it: which tensors it has, and the way back from them to parameters.

The two differ where transformers keeps in one tensor what a checkpoint keeps apart (the experts of a layer), or has
another name for it. `runtime/naming.py` is the way out, this is the way in; the rules of both are transformers' own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, dot_natural_key

from llmac.errors import EngineError
from llmac.runtime.naming import Conversion, conversions


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors of a module, and the tensors of its checkpoint that are made of them; as a rule one of each."""

    conversion: Conversion
    names: tuple[frozenset[str], ...]
    """Of each tensor in the checkpoint: all it may go by, several where weights are tied."""
    shapes: tuple[torch.Size, ...]
    """Of each tensor in the checkpoint."""
    required: bool
    """False for saved buffers, and for parameters that checkpoints of the architecture do without."""

    def restored(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The module's tensors by name, from the checkpoint's, which are taken out of `tensors` to free them early."""
        reverse, sources = self.conversion.converter, self.conversion.sources
        if reverse is None:
            return {sources[0]: tensors.popitem()[1]}
        converter = reverse.reverse_transform()
        # Experts are stacked in the order of their numbers.
        for name in sorted(tensors, key=dot_natural_key):
            _, pattern = converter.rename_source_key(name)
            # Takes tensors as well as the futures it is annotated with; a pattern of None fails `check_restorable`.
            converter.add_tensor(sources[0], name, pattern, tensors.pop(name))  # type: ignore[arg-type]
        assert isinstance(converter, WeightConverter)
        found = converter.convert(sources[0], model=model, config=getattr(model, "config", None))
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


def parts(model: nn.Module) -> list[Part]:
    """All parts of the module, which may be on the meta device; tied weights, told by identity, are one part.

    >>> [(sorted(*part.names), *part.shapes) for part in parts(nn.Linear(2, 1))]
    [(['weight'], torch.Size([1, 2])), (['bias'], torch.Size([1]))]
    """
    state = model.state_dict(keep_vars=True)
    needed = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # transformers' own list of what `save_pretrained` leaves out.
    needed.difference_update(getattr(model, "_keys_to_ignore_on_save", None) or ())
    same: dict[tuple[int, ...], list[tuple[Conversion, dict[str, Tensor]]]] = {}
    for conversion in conversions(model, state):
        identity = tuple(id(state[name]) for name in conversion.sources)
        made = conversion(_without_memory(state, conversion.sources), model)
        same.setdefault(identity, []).append((conversion, made))
    return [
        Part(
            conversion=twins[0][0],
            names=tuple(map(frozenset, zip(*(made for _, made in twins), strict=True))),
            shapes=tuple(tensor.shape for tensor in twins[0][1].values()),
            required=any(not needed.isdisjoint(twin.sources) for twin, _ in twins),
        )
        for twins in same.values()
    ]


def check_restorable(model: nn.Module, found: Iterable[Part]) -> None:
    """Refuse an architecture whose parameters cannot be made of its checkpoint's tensors part by part.

    Raises:
        EngineError: there and back again, names or shapes are not what they were. The message names the part.
    """
    state = model.state_dict(keep_vars=True)
    for part in found:
        if part.conversion.converter is None:
            continue
        want = _without_memory(state, part.conversion.sources)
        error: Exception | None = None
        got: dict[str, Tensor] = {}
        try:
            got = part.restored(part.conversion(want, model), model)
        except Exception as failure:  # every rule of transformers has errors of its own
            error = failure
        if error or _shapes(got) != _shapes(want):
            raise EngineError(
                f"{', '.join(want)} of {type(model).__name__} cannot be put together from the tensors of a "
                f"checkpoint: expected {_shapes(want)}, found {error or _shapes(got)}. Use rollout.engine=vllm, which "
                "loads checkpoints its own way"
            ) from error


def restored(
    model: nn.Module, found: Sequence[Part], stream: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters (and buffers) of the model, each with its new value, from a stream in checkpoint naming.

    A value is a copy, on the parameter's device and in its precision. Of what is converted, the tensors of one part are
    in memory twice or three times for a moment; all else once.

    Args:
        model: what `found` are the parts of; it is not changed.
        found: from `parts`.
        stream: complete and without repetitions, as `Manifest.checked` gives it.
    """
    state = model.state_dict(keep_vars=True)
    part_of = {name: part for part in found for names in part.names for name in names}
    incomplete: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stream:
        part = part_of[name]
        like = state[part.conversion.sources[0]]
        arrived = incomplete.setdefault(part.conversion.name, {})
        arrived[name] = tensor.detach().to(like, copy=True)
        if len(arrived) == len(part.names):
            del incomplete[part.conversion.name]
            for target, value in part.restored(arrived, model).items():
                yield state[target], value.to(state[target])


def _without_memory(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: state[name].detach().to("meta") for name in names}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
