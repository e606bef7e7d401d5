"""Where the weights of a head critic come from: the policy, a saved critic, a reward model, any language model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from transformers import PreTrainedModel

from llmac.core.value_heads import Head, Scalar, same_outputs
from llmac.critics.bench import CriticBench
from llmac.errors import CheckpointError, ConfigError
from llmac.models.loading import LanguageModel, add_lora, load_backbone, torch_dtype
from llmac.models.policy import causal_lm
from llmac.models.value_heads import (
    HEAD_FILE,
    HeadModule,
    HeadSpec,
    LinearHead,
    load_head,
    normalize,
)
from llmac.models.value_init import is_reward_model, load_reward_model
from llmac.models.value_model import ValueModel
from llmac.runtime.saving import whole_weights


class Start(Protocol):
    """What is read of a critic's settings."""

    @property
    def init(self) -> str:
        """`policy`, a folder or a Hub id."""
        ...

    @property
    def trunk(self) -> Literal["own", "shared"]:
        """Whose trunk."""
        ...

    @property
    def detach_trunk(self) -> bool:
        """Whether a shared one is left alone."""
        ...

    @property
    def lora(self) -> bool:
        """Adapters on a trunk of its own."""
        ...

    def spec(self, width: int) -> HeadSpec:
        """The head on a trunk with hidden vectors of `width`."""
        ...


def starting_model(config: Start, bench: CriticBench) -> tuple[ValueModel, bool]:
    """The value model, and whether its head was never trained.

    Raises:
        ConfigError: nothing can be loaded from `init`, or its head is another.
    """
    if config.trunk == "shared":
        trunk = cast(PreTrainedModel, causal_lm(bench.policy.model).base_model)
        states = bench.policy_states if config.detach_trunk else None
        model = ValueModel(trunk, _spec_on(trunk, config), states=states)
        if config.init == "policy":
            return model, True
        _take_head(model, *_saved_head(config, trunk), config)
        return model, False
    if (Path(config.init) / HEAD_FILE).is_file():
        model, fresh = _from_critic(config, bench), False
    elif config.init != "policy" and is_reward_model(bench.model, config.init):
        model, fresh = _from_reward_model(config, bench)
    else:
        trunk = load_backbone(bench.model, None if config.init == "policy" else config.init)
        model, fresh = ValueModel(trunk, _spec_on(trunk, config)), True
    return (adapted(model, bench) if config.lora else model), fresh


def adapted(model: ValueModel, bench: CriticBench) -> ValueModel:
    """The same with low-rank adapters on its trunk."""
    assert bench.model.lora is not None, "checked with the recipe"
    assert isinstance(model.backbone, PreTrainedModel)
    return model.copy_on(add_lora(model.backbone, bench.model.lora, task="FEATURE_EXTRACTION"))


def _from_critic(config: Start, bench: CriticBench) -> ValueModel:
    try:
        saved = ValueModel.from_pretrained(config.init, dtype=torch_dtype(bench.model))
    except CheckpointError as error:
        raise ConfigError(f"critic.init: {error}") from error
    model = ValueModel(saved.backbone, _spec_on(saved.backbone, config))
    _take_head(model, saved.head, saved.spec, config)
    return model


def _saved_head(config: Start, trunk: LanguageModel) -> tuple[HeadModule, HeadSpec]:
    """Of a critic that another run had on the policy's trunk; its copy of that trunk is left aside."""
    try:
        return load_head(Path(config.init), trunk.config.get_text_config().hidden_size)
    except CheckpointError as error:
        raise ConfigError(
            f"critic.init with critic.trunk: shared takes the head of a saved critic: {error}"
        ) from error


def _take_head(model: ValueModel, head: HeadModule, spec: HeadSpec, config: Start) -> None:
    """Give the model the weights of a saved head of the same kind."""
    apart = _differences(spec, model.spec)
    if apart:
        raise ConfigError(
            f"critic.init: {config.init} was saved with another head than this critic has: {'; '.join(apart)}. "
            "Change the critic's settings to those, or start from a model without a head"
        )
    if spec.normalized and not model.spec.normalized:
        # Its outputs come in units of rewards: V = 1 · (W' · h + b') + mean.
        normalize(head, mean=float(head.offset), deviation=1.0, keep_values=True)
    model.head.load_state_dict(head.state_dict(), strict=False)


def _from_reward_model(config: Start, bench: CriticBench) -> tuple[ValueModel, bool]:
    trunk, score = load_reward_model(bench.model, config.init)
    model = ValueModel(trunk, _spec_on(trunk, config))
    head = model.spec.head
    says_anything = isinstance(head, Scalar) and head.bounds is None and not model.spec.normalized
    if score is None or not says_anything or not isinstance(model.head, LinearHead):
        return model, True
    [weight] = whole_weights(score, keep=True).values()
    with torch.no_grad():
        model.head.weight.copy_(weight)
    return model, False


def _spec_on(trunk: LanguageModel, config: Start) -> HeadSpec:
    return config.spec(trunk.config.get_text_config().hidden_size)


def _differences(saved: HeadSpec, wanted: HeadSpec) -> Sequence[str]:
    apart = []
    if not same_outputs(saved.head, wanted.head):
        apart.append(f"saved {_said(saved.head)}, wanted {_said(wanted.head)}")
    for name in ("heads", "hidden_layers", "layer_norm", "activation"):
        before, now = getattr(saved, name), getattr(wanted, name)  # fields of HeadSpec
        if before != now and not (name == "activation" and not saved.hidden_layers):
            apart.append(f"saved {name} {before}, wanted {now}")
    return apart


def _said(head: Head) -> str:
    fields = ", ".join(
        f"{name} {getattr(head, name)}"  # a list of the head's own fields
        for name in head.foretells
    )
    return f"{head.kind} ({fields})" if fields else head.kind
