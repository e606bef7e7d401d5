"""A trained reward model as the start of a critic: its trunk, and its score as the first values."""

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from llmac.errors import ConfigError
from llmac.models.loading import ModelSpec, torch_dtype


def is_reward_model(spec: ModelSpec, name: str) -> bool:
    """Whether a Hub id or folder holds a sequence classifier; False as well where nothing can be read."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return False  # loading the model will say what is wrong
    return any(a.endswith("ForSequenceClassification") for a in config.architectures or ())


def load_reward_model(spec: ModelSpec, name: str) -> tuple[PreTrainedModel, nn.Linear | None]:
    """The trunk of a sequence classifier, and its score layer if it has one output.

    Raises:
        ConfigError: nothing can be loaded from there, or weights are missing.
    """
    options: dict[str, Any] = (
        {} if spec.attention is None else {"attn_implementation": spec.attention}
    )
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch_dtype(spec),
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as reason:
        raise ConfigError(
            f"critic.init: no reward model could be loaded from {name!r}: {str(reason)[:500]}"
        ) from reason
    if found["missing_keys"]:
        # transformers would go on with random weights in their place.
        raise ConfigError(
            f"critic.init: the reward model {name!r} lacks weights: {sorted(found['missing_keys'])[:3]}"
        )
    score = getattr(model, "score", None)  # what decoder-only classifiers call it; others differ
    one = isinstance(score, nn.Linear) and model.config.num_labels == 1 and score.bias is None
    return model.base_model, score if one else None
