"""Names to live tokenizers and models: Hub ids and local folders alike."""

import logging
from typing import Any, Literal, Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmac.errors import ConfigError

logger = logging.getLogger(__name__)

LanguageModel = PreTrainedModel | PeftModel
"""A model as transformers gives it, or with peft adapters in place."""


class LoraSpec(Protocol):
    """What `model.lora` of a recipe says."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> int: ...
    @property
    def target_modules(self) -> str | list[str]: ...


class ModelSpec(Protocol):
    """What the `model` section of a recipe says."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def attention(self) -> str | None: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def lora(self) -> LoraSpec | None: ...


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token.

    Raises:
        ConfigError: there is none at that name, or it has neither a padding nor an end-of-sequence token.
    """
    name = spec.tokenizer or spec.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as reason:
        raise ConfigError(
            f"model.tokenizer: no tokenizer could be loaded from {name!r}: {reason}"
        ) from reason
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        # transformers makes one up, without a vocabulary, where the files are missing.
        raise ConfigError(
            f"model.tokenizer: there are no tokenizer files at {name!r}; set model.tokenizer to a folder or Hub id "
            "that has them"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"model.tokenizer: {name!r} has neither a padding nor an end-of-sequence token; "
                "responses could not end. Set tokenizer.eos_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id rows are padded with; `load_tokenizer` saw to it that there is one."""
    return cast(int, tokenizer.pad_token_id)


def load_causal_lm(
    spec: ModelSpec, name: str | None = None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model of a recipe, without adapters, dropout off.

    Dropout is off because the policy that learns must be the policy that sampled: with dropout the importance ratio
    of an on-policy step is not 1.
    """
    return _load(AutoModelForCausalLM, spec, name, dtype)


def load_backbone(spec: ModelSpec, name: str | None = None) -> PreTrainedModel:
    """The same model without its language head (`AutoModel`), for a critic."""
    return _load(AutoModel, spec, name)


def add_lora(model: PreTrainedModel, lora: LoraSpec, *, task: str = "CAUSAL_LM") -> PeftModel:
    """Freeze `model` and put trainable low-rank adapters on it; initially they change nothing.

    Raises:
        ConfigError: peft finds nothing to adapt under these names.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type=task,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as reason:
        linear = {
            n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        raise ConfigError(
            f"model.lora.target_modules is {lora.target_modules!r}: {_short(reason)} "
            f"Linear layers here: {', '.join(sorted(linear))}"
        ) from reason
    assert isinstance(adapted, PeftModel)
    return adapted


def train_in_full_mode(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Put a model in training mode with every dropout at 0, and recompute activations if asked to."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(
            getattr(module, "attention_dropout", None), float
        ):  # attention layers copy it
            object.__setattr__(module, "attention_dropout", 0.0)
    if gradient_checkpointing:
        causal_lm: Any = model  # PreTrainedModel, or a peft model that passes these calls on
        causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        causal_lm.enable_input_require_grads()


def text_config(spec: ModelSpec) -> Any:
    """The language part of a model's configuration; which fields it has, depends on the architecture.

    Raises:
        ConfigError: there is no model configuration at that name.
    """
    try:
        config = AutoConfig.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as reason:
        raise ConfigError(
            f"model.name: no model configuration at {spec.name!r}: {_short(reason)}"
        ) from reason
    return config.get_text_config()


def context_length(spec: ModelSpec) -> int | None:
    """Tokens the model was made for, prompt and response together; None if its configuration does not say.

    Raises:
        ConfigError: there is no model configuration at that name.
    """
    length = getattr(text_config(spec), "max_position_embeddings", None)  # absent in some
    return int(length) if length else None


def check_vocabulary(spec: ModelSpec, token_id: int) -> None:
    """Refuse a tokenizer whose tokens the model has no embedding for.

    Args:
        spec: the model.
        token_id: the largest id that prompts have.

    Raises:
        ConfigError: the model's vocabulary is smaller.
    """
    size = getattr(text_config(spec), "vocab_size", None)  # absent in some
    if size is not None and token_id >= size:
        raise ConfigError(
            f"the prompts have token {token_id}, and the model has {size} tokens: the tokenizer of "
            f"{spec.tokenizer or spec.name} is not the one {spec.name} was trained with; set model.tokenizer"
        )


def torch_dtype(spec: ModelSpec) -> torch.dtype:
    """The dtype of the trained parameters."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.dtype]


def _load(
    auto: Any, spec: ModelSpec, name: str | None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    name = name or spec.name
    options: dict[str, Any] = (
        {} if spec.attention is None else {"attn_implementation": spec.attention}
    )
    try:
        model, found = auto.from_pretrained(
            name,
            dtype=dtype or torch_dtype(spec),
            revision=spec.revision if name == spec.name else None,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as reason:
        raise ConfigError(
            f"{_key(spec, name)}: no model could be loaded from {name!r}: {_short(reason)}"
        ) from reason
    missing = sorted(found["missing_keys"])
    if missing:
        # transformers would go on with random weights in their place.
        raise ConfigError(
            f"{_key(spec, name)}: the checkpoint {name!r} lacks {len(missing)} of the weights of a "
            f"{type(model).__name__}: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}. "
            "Is it complete, and of this kind of model?"
        )
    for field in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if getattr(model.config, field, 0.0):  # each architecture has some of these
            setattr(model.config, field, 0.0)
            logger.info("%s: %s is off during reinforcement learning", name, field)
    return model


def _key(spec: ModelSpec, name: str) -> str:
    """Where a recipe may have this name."""
    return "model.name" if name == spec.name else "model.reference or critic.init"


def _short(reason: Exception) -> str:
    """What transformers says, without its lists of all architectures."""
    text = str(reason)
    return text if len(text) <= 500 else text[:500] + " ..."
