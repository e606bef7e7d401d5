"""Whether the weights of one model can be put into the engine of another, from configurations alone."""

from llmac.errors import ConfigError
from llmac.models.loading import ModelSpec, load_tokenizer, text_config

SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
"""What the shapes of weights follow from."""
COMPUTATION = (
    *("hidden_act", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling"),
    *("layer_types", "sliding_window", "attention_bias", "mlp_bias"),
)
"""What is computed with them: another value of one of these is another model."""


def check_alike(policy: ModelSpec, critic: ModelSpec) -> str:
    """Refuse a critic whose weights the policy's engine cannot have, or for which it reads other tokens.

    Nothing but configurations and tokenizers is read.

    Args:
        policy: the recipe's model.
        critic: the model whose weights its engine is to have for a while.

    Returns:
        What was found, for people.

    Raises:
        ConfigError: architecture or tokenizer is another.
    """
    theirs, mine = text_config(policy).to_dict(), text_config(critic).to_dict()
    apart = [key for key in (*SHAPE, *COMPUTATION) if mine.get(key) != theirs.get(key)]
    if apart:
        found = ", ".join(f"{key} ({mine.get(key)}, not {theirs.get(key)})" for key in apart)
        raise ConfigError(
            f"critic.engine: shared needs the architecture of the policy, and {critic.name} differs from {policy.name} "
            f"in {found}; set critic.engine: own"
        )
    if load_tokenizer(critic).get_vocab() != load_tokenizer(policy).get_vocab():
        raise ConfigError(
            f"critic.engine: shared reads with the policy's tokenizer, and that of {critic.tokenizer or critic.name} "
            "is another; set critic.engine: own"
        )
    return f"the policy's engine can have the weights of {critic.name}"
