"""The weights of a value head: from a hidden vector to the numbers that a `core.value_heads.Head` reads."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from llmac.core.categorical_heads import C51, HLGauss, OutcomeClasses, PooledOutcomes, TwoHot
from llmac.core.ensembles import Combination
from llmac.core.value_heads import Bernoulli, Gaussian, Head, Quantile, Scalar
from llmac.errors import CheckpointError

HEADS: dict[str, type[Head]] = {
    head.kind: head
    for head in (
        Scalar,
        Bernoulli,
        HLGauss,
        TwoHot,
        C51,
        Quantile,
        Gaussian,
        OutcomeClasses,
        PooledOutcomes,
    )
}
"""Every kind of head by its name. One more is a dataclass and a place in this list."""

HEAD_FILE = "value_head.safetensors"
ABOUT_FILE = "value_model.json"


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Everything about a head but its weights: enough to build it again."""

    head: Head = field(default_factory=Scalar)
    heads: int = 1
    """Members of the ensemble."""
    combination: Combination = field(default_factory=Combination)
    hidden_layers: tuple[int, ...] = ()
    """Widths between the hidden vector and the outputs."""
    layer_norm: bool = False
    activation: Literal["relu", "gelu"] = "relu"
    normalized: bool = False
    """Whether the outputs are in units of the returns' running deviation."""

    def values(self, raw: Tensor) -> Tensor:
        """Values [...] of outputs [..., E, N], in float32."""
        return self.combination(self.head.decode(raw.float()))

    def to_json(self) -> str:
        """As `from_json` reads it."""
        about = {"head": self.head.kind, "settings": dataclasses.asdict(cast(Any, self.head))}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own |= {"combination": dataclasses.asdict(self.combination)}
        return json.dumps(about | {name: own[name] for name in own if name != "head"}, indent=1)

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "HeadSpec":
        """What `to_json` wrote; also {"head": "scalar"} alone, the only head there once was.

        Raises:
            CheckpointError: a head that is not in `HEADS`, or settings it does not have.
        """
        about = json.loads(text)
        kind = about.pop("head", None)
        if kind not in HEADS:
            raise CheckpointError(f"{where} has a head {kind!r}; known are {', '.join(HEADS)}")
        try:
            head = HEADS[kind](**_tuples(about.pop("settings", {})))
            combination = Combination(**about.pop("combination", {}))
            return cls(head=head, combination=combination, **_tuples(about))
        except TypeError as error:
            raise CheckpointError(f"{where} does not describe a value head: {error}") from error


class Wide(nn.Linear):
    """W · x + b, computed in float32 whatever the weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., N] of inputs [..., H]."""
        return functional.linear(input.float(), self.weight.float(), self.bias.float())


class WideNorm(nn.LayerNorm):
    """Layer normalisation, computed in float32 whatever the weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        """The same shape."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class LinearHead(Wide):
    """scale · (W · h + b) + offset: outputs of a head without hidden layers.

    W and b start at 0. `offset` and `scale` are no parameters: setting the offset to outputs that say the mean reward
    gives the untrained critic an explained variance of 0, not a negative one, and does so wherever an optimizer keeps
    copies of the parameters (ZeRO).
    """

    offset: Tensor
    scale: Tensor | None

    def __init__(self, width: int, outputs: int, *, normalized: bool = False) -> None:
        """A head over hidden vectors of `width`."""
        super().__init__(width, outputs, dtype=torch.float32)
        _start_at_zero(self)
        _add_level(self, outputs, normalized=normalized)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LinearHead":
        return _keep_level(self, super()._apply(fn, recurse))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., 1, N] of hidden vectors [..., H]."""
        with torch.autocast(input.device.type, enabled=False):
            return _leveled(self, super().forward(input)[..., None, :])

    def last_layers(self) -> Iterator[nn.Linear]:
        """The layer itself."""
        yield self


class HeadEnsemble(nn.Module):
    """Several heads, or one with hidden layers: scale · MLP_e(h) + offset.

    Last layers start at 0, and the hidden layers of each member in their own way, so that the members agree at first
    and then learn differently. Every process and every run draws the same hidden layers.
    """

    offset: Tensor
    scale: Tensor | None

    def __init__(self, width: int, spec: HeadSpec) -> None:
        """Heads over hidden vectors of `width`."""
        super().__init__()
        self.members = nn.ModuleList(_member(width, spec, seed) for seed in range(spec.heads))
        _add_level(self, spec.head.outputs, normalized=spec.normalized)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HeadEnsemble":
        return _keep_level(self, super()._apply(fn, recurse))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., E, N] of hidden vectors [..., H]."""
        with torch.autocast(input.device.type, enabled=False):
            each = [member(input) for member in self.members]
            return _leveled(self, torch.stack(each, dim=-2))

    def last_layers(self) -> Iterator[nn.Linear]:
        """That of each member."""
        for member in self.members:
            yield cast(nn.Linear, cast(nn.Sequential, member)[-1])


HeadModule = LinearHead | HeadEnsemble


def build_head(width: int, spec: HeadSpec) -> HeadModule:
    """The untrained weights of a head over hidden vectors of `width`."""
    if spec.heads == 1 and not spec.hidden_layers and not spec.layer_norm:
        return LinearHead(width, spec.head.outputs, normalized=spec.normalized)
    return HeadEnsemble(width, spec)


@torch.no_grad()
def start_at(module: HeadModule, head: Head, mean: float) -> None:
    """Let an untrained head say `mean` everywhere."""
    module.offset.copy_(head.start(mean).view_as(module.offset))


@torch.no_grad()
def normalize(module: HeadModule, *, mean: float, deviation: float, keep_values: bool) -> None:
    """Put the outputs of a scalar head in other units: V = deviation · (W · h + b) + mean.

        keep_values:  W' = W · σ/σ',    b' = (σ · b + μ - μ') / σ'

    With `keep_values` not a value changes (PopArt: van Hasselt et al. 2016, arXiv:1602.07714). Without, the
    same weights say values in the new units.
    """
    assert module.scale is not None, "built for normalisation"
    if keep_values:
        old_mean, old = float(module.offset), float(module.scale)
        for layer in module.last_layers():
            layer.weight.mul_(old / deviation)
            layer.bias.mul_(old).add_(old_mean - mean).div_(deviation)
    module.offset.fill_(mean)
    module.scale.fill_(deviation)


def save_head(module_weights: dict[str, Tensor], spec: HeadSpec, directory: Path) -> None:
    """Put a head beside the backbone that is saved in `directory`, so that it becomes a value model."""
    save_file(module_weights, directory / HEAD_FILE)
    (directory / ABOUT_FILE).write_text(spec.to_json())


def load_head(directory: Path, width: int) -> tuple[HeadModule, HeadSpec]:
    """What `save_head` wrote.

    Raises:
        CheckpointError: no head there, an unknown one, or weights of another shape.
    """
    spec = saved_spec(directory)
    module = build_head(width, spec)
    weights = load_file(directory / HEAD_FILE)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{directory / HEAD_FILE} does not fit: {error}") from error
    return module, spec


def saved_spec(directory: Path) -> HeadSpec:
    """What kind of head is saved in a folder.

    Raises:
        CheckpointError: none.
    """
    for name in (HEAD_FILE, ABOUT_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}: it is not a value model saved by llmac"
            )
    about = directory / ABOUT_FILE
    return HeadSpec.from_json(about.read_text(), where=str(about))


def _member(width: int, spec: HeadSpec, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [WideNorm(width, dtype=torch.float32)] if spec.layer_norm else []
    for size in spec.hidden_layers:
        hidden = Wide(width, size, dtype=torch.float32)
        if not hidden.weight.is_meta:
            nn.init.kaiming_uniform_(hidden.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(hidden.bias)
        layers += [hidden, nn.ReLU() if spec.activation == "relu" else nn.GELU()]
        width = size
    last = Wide(width, spec.head.outputs, dtype=torch.float32)
    _start_at_zero(last)
    return nn.Sequential(*layers, last)


def _start_at_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _add_level(module: nn.Module, outputs: int, *, normalized: bool) -> None:
    module.register_buffer("offset", torch.zeros(() if outputs == 1 else (outputs,)))
    # Only where it is used: checkpoints of other heads have none.
    module.register_buffer("scale", torch.ones(()) if normalized else None)


def _keep_level(module: Any, applied: Any) -> Any:
    """Buffers stay in float32 when weights are cast: a rounded start would not be the mean reward."""
    for name in ("offset", "scale"):
        buffer = getattr(module, name)
        if buffer is not None and buffer.dtype != torch.float32:
            setattr(module, name, buffer.float())
    return applied


def _leveled(module: Any, raw: Tensor) -> Tensor:
    scaled = raw if module.scale is None else raw * module.scale
    return scaled + module.offset


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
