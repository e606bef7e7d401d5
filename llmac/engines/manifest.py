"""What a complete set of weights looks like: names, shapes, and which names are one tensor."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmac.engines.checkpoint_form import Part, parts
from llmac.errors import EngineError

NAMED_AT_MOST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The weights an engine needs, and the names they go by."""

    shapes: dict[str, torch.Size]
    """Shape of every tensor a checkpoint of the model may have, under every name it has."""
    aliases: tuple[frozenset[str], ...]
    """Names that are one tensor (tied embeddings), each name in exactly one set. One of them must arrive."""
    optional: frozenset[str]
    """Saved buffers, and what checkpoints do without: welcome, but a stream is complete without them."""

    @classmethod
    def of(cls, model: nn.Module, found: Sequence[Part] | None = None) -> "Manifest":
        """The manifest of a module, in the naming of its checkpoints; a module on the meta device will do.

        Args:
            model: tied parameters are told by identity.
            found: its `parts`, by whoever has them already.

        >>> Manifest.of(nn.Linear(2, 1)).shapes
        {'weight': torch.Size([1, 2]), 'bias': torch.Size([1])}
        """
        found = parts(model) if found is None else found
        required = [names for part in found if part.required for names in part.names]
        shapes = {
            name: shape
            for part in found
            for names, shape in zip(part.names, part.shapes, strict=True)
            for name in sorted(names)
        }
        return cls(
            shapes=shapes,
            aliases=tuple(required),
            optional=frozenset(shapes.keys() - frozenset[str]().union(*required)),
        )

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same stream; raises where it stops being a complete set of weights.

        A second name of a tied tensor is dropped after its shape has been checked.

        Raises:
            EngineError: a name is unknown or comes twice, a shape differs, or at the end some are missing. The message
                names them.
        """
        owner = {name: index for index, names in enumerate(self.aliases) for name in names}
        arrived: set[str] = set()
        taken: set[int] = set()
        for name, tensor in weights:
            if name not in self.shapes:
                raise EngineError(
                    f"the stream of weights has {name}, which checkpoints of this model lack; expected names such as "
                    f"{_some(self.shapes)}. The engine's model and the trained one must be the same checkpoint, with "
                    "adapters merged"
                )
            if tensor.shape != self.shapes[name]:
                raise EngineError(
                    f"weight {name} arrived with shape {tuple(tensor.shape)}, but the engine's model has "
                    f"{tuple(self.shapes[name])}; a ZeRO-3 shard must be gathered before it is sent"
                )
            if name in arrived:
                raise EngineError(
                    f"weight {name} arrived twice in one update; send every weight once"
                )
            arrived.add(name)
            if name in owner:
                if owner[name] in taken:
                    continue
                taken.add(owner[name])
            yield name, tensor
        missing = [min(names) for index, names in enumerate(self.aliases) if index not in taken]
        if missing:
            raise EngineError(
                f"{len(missing)} of {len(self.aliases)} weights did not arrive: {_some(missing)}. An update carries "
                "the whole model, tied weights once"
            )


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = sorted(names)
    more = len(listed) - NAMED_AT_MOST
    return ", ".join(listed[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
