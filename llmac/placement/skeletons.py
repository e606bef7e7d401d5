"""Models without weights: what decides how much memory they take, counted on the real classes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from llmac.errors import ConfigError
from llmac.models.loading import LoraSpec, ModelSpec, add_lora, torch_dtype
from llmac.models.value_model import ValueModel

if TYPE_CHECKING:
    from llmac.critics.head_config import HeadConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of a model, tied ones once."""

    shape: tuple[int, ...]
    item_bytes: int
    trainable: bool
    linear: bool
    """The matrix of a linear layer, which autocast copies in bfloat16."""
    block: int | None
    """Which transformer block it is in; None: outside of all."""

    @property
    def elements(self) -> int:
        """How many numbers."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skeleton:
    """A model's parameters and the sizes its activations and cache depend on. Made once for each model."""

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    """Width of the feed-forward part that one token passes through: with experts, of those it is sent to."""
    vocabulary: int
    context: int | None
    """Tokens the model was made for; None: its configuration does not say."""

    @property
    def elements(self) -> int:
        """How many parameters."""
        return sum(weight.elements for weight in self.weights)

    @property
    def trainable(self) -> int:
        """How many of them learn."""
        return sum(weight.elements for weight in self.weights if weight.trainable)

    @property
    def bytes(self) -> int:
        """Of the whole model, in the precision it is loaded in."""
        return sum(weight.elements * weight.item_bytes for weight in self.weights)

    @property
    def matrices(self) -> int:
        """Elements in the matrices of linear layers."""
        return sum(weight.elements for weight in self.weights if weight.linear)


def policy_skeleton(spec: ModelSpec) -> Skeleton:
    """The policy of a recipe: with adapters, if the recipe has them."""
    return _policy(_ident(spec), _adapters(spec.lora))


def bare_skeleton(spec: ModelSpec, name: str | None = None) -> Skeleton:
    """A causal language model without adapters, nothing of it trainable: a sampler's, or a reference."""
    return _bare(_ident(spec, name))


def critic_skeleton(spec: ModelSpec, critic: "HeadConfig") -> Skeleton:
    """What the critic's optimizer owns: backbone and head, or the head alone on the policy's trunk."""
    name = None if critic.init == "policy" else critic.init
    lora = spec.lora if critic.lora else None
    return _critic(_ident(spec, name), _adapters(lora), critic)


def reward_skeleton(name: str) -> Skeleton:
    """A reward model, in float32 as it is loaded."""
    return _reward(name)


@dataclass(frozen=True, slots=True)
class _Ident:
    """What a configuration is looked up by, hashable."""

    name: str
    revision: str | None
    trust_remote_code: bool
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Adapters:
    """A `LoraSpec` that can be a key."""

    r: int
    alpha: int
    target_modules: Any


def _ident(spec: ModelSpec, name: str | None = None) -> _Ident:
    same = name is None or name == spec.name
    return _Ident(
        name or spec.name,
        spec.revision if same else None,
        spec.trust_remote_code,
        torch_dtype(spec),
    )


def _adapters(lora: LoraSpec | None) -> _Adapters | None:
    if lora is None:
        return None
    targets = lora.target_modules
    return _Adapters(lora.r, lora.alpha, targets if isinstance(targets, str) else tuple(targets))


@lru_cache(maxsize=64)
def _policy(ident: _Ident, adapters: _Adapters | None) -> Skeleton:
    model = _built(AutoModelForCausalLM, ident)
    return _measured(_adapted(model, adapters, "CAUSAL_LM"), model.config)


@lru_cache(maxsize=64)
def _bare(ident: _Ident) -> Skeleton:
    model = _built(AutoModelForCausalLM, ident)
    return _measured(model.requires_grad_(False), model.config)


@lru_cache(maxsize=64)
def _critic(ident: _Ident, adapters: _Adapters | None, critic: "HeadConfig") -> Skeleton:
    model = _built(AutoModel, ident)
    trunk = _adapted(model, adapters, "FEATURE_EXTRACTION")
    with torch.device("meta"):
        value_model = ValueModel(trunk, critic.spec(model.config.get_text_config().hidden_size))
    shared = critic.trunk == "shared"
    return _measured(value_model.head if shared else value_model, model.config)


@lru_cache(maxsize=64)
def _reward(name: str) -> Skeleton:
    model = _built(AutoModelForSequenceClassification, _Ident(name, None, False, torch.float32))
    return _measured(model.requires_grad_(False), model.config)


def _built(auto: Any, ident: _Ident) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            ident.name, revision=ident.revision, trust_remote_code=ident.trust_remote_code
        )
    except (OSError, ValueError) as reason:
        raise ConfigError(
            f"no model configuration at {ident.name!r}, and shapes are counted on it: {str(reason)[:300]} "
            "Set model.name to a Hub id that can be reached, or to a folder with the model's config.json (the weights "
            "are not needed)"
        ) from reason
    if getattr(config.get_text_config(), "num_attention_heads", None) is None:  # state spaces
        raise ConfigError(
            f"{ident.name!r} is a {type(config).__name__}, which has no attention; cache and activations are planned "
            "for transformers only"
        )
    try:
        with torch.device("meta"):
            return auto.from_config(
                config, dtype=ident.dtype, trust_remote_code=ident.trust_remote_code
            )
    except ValueError as reason:
        raise ConfigError(
            f"{ident.name!r} is a {type(config).__name__}, which {auto.__name__} cannot build; model.name must be a "
            f"causal language model, and a reward model a sequence classifier: {str(reason)[:200]}"
        ) from reason


def _adapted(model: Any, adapters: _Adapters | None, task: str) -> Any:
    if adapters is None:
        return model
    with torch.device("meta"):
        return add_lora(model, adapters, task=task)


def _measured(model: nn.Module, config: Any) -> Skeleton:
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    # Each of these is absent in some architectures; what follows is what their authors then mean.
    experts = getattr(text, "num_experts_per_tok", None)
    expert_width = getattr(text, "moe_intermediate_size", None)
    dense_width = getattr(text, "intermediate_size", None) or 4 * int(text.hidden_size)
    return Skeleton(
        weights=tuple(_weights(model)),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=int(experts * (expert_width or dense_width) if experts else dense_width),
        vocabulary=int(text.vocab_size),
        context=getattr(text, "max_position_embeddings", None),
    )


def _weights(model: nn.Module) -> Iterable[Weight]:
    blocks = _blocks(model)
    # Collected first: a tied output layer is met as an embedding before.
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    seen: set[int] = set()
    for name, module in model.named_modules():
        block = next((i for i, path in enumerate(blocks) if f"{name}.".startswith(path)), None)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield Weight(
                    shape=tuple(parameter.shape),
                    item_bytes=parameter.element_size(),
                    trainable=parameter.requires_grad,
                    linear=id(parameter) in linear,
                    block=block,
                )


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks, as transformers' models declare their classes."""
    names: set[str] = set()
    for part in model.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())  # transformers' models have it
    return [f"{path}." for path, part in model.named_modules() if type(part).__name__ in names]
