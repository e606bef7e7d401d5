"""Whether models and a critic go together, from configurations, tokenizers and heads alone."""

from collections.abc import Iterable
from pathlib import Path

from llmac.config.schema import ModelConfig
from llmac.core.categorical_heads import PooledOutcomes
from llmac.core.value_heads import Head
from llmac.errors import ConfigError
from llmac.models.loading import ModelSpec, load_tokenizer, text_config


def check_same_tokens(one: ModelSpec, others: Iterable[ModelSpec]) -> None:
    """Refuse models that read other tokens: what one says of a token would be taken for another.

    Raises:
        ConfigError: some tokenizer has another vocabulary.
    """
    known = load_tokenizer(one).get_vocab()
    for other in others:
        if load_tokenizer(other).get_vocab() != known:
            raise ConfigError(
                f"{other.name} and {one.name} have different tokenizers, and the same token means something else to "
                "each; take models with one tokenizer"
            )


def check_critic_reads(policy: ModelSpec, critic: Path, *, sources: Iterable[Path]) -> None:
    """Refuse a critic that was not made for the policy's tokens.

    Args:
        policy: the one that is guided.
        critic: its folder.
        sources: folders that may have the critic's tokenizer; those without one say nothing.

    Raises:
        ConfigError: tokens that the critic has no embedding of, or another tokenizer.
    """
    known = load_tokenizer(policy).get_vocab()
    width = text_config(ModelConfig(name=str(critic))).vocab_size
    # A tokenizer may have more tokens than its model, which are then never said.
    last = min(max(known.values()), text_config(policy).vocab_size - 1)
    if last >= width:
        raise ConfigError(
            f"the critic {critic} reads {width} tokens, and those of {policy.name} have ids up to {last}; "
            "take a critic that was trained with this policy"
        )
    for folder in sources:
        if not (folder / "tokenizer_config.json").is_file():
            continue
        if load_tokenizer(ModelConfig(name=str(folder))).get_vocab() != known:
            raise ConfigError(
                f"the critic {critic} was trained with the tokenizer of {folder}, and that of {policy.name} is "
                "another; take a critic that was trained with this policy"
            )


def check_judges_states(head: Head) -> None:
    """Refuse a head whose outputs say something of whole responses only.

    Raises:
        ConfigError: outcomes are pooled over the tokens.
    """
    if isinstance(head, PooledOutcomes):
        raise ConfigError(
            "the critic has learned which outcome a whole response has (code_outcomes), and says no values of single "
            "states; take one that does, for example of critic: outcome_classes"
        )


def check_says_chances(head: Head) -> None:
    """Refuse a head whose values need not be probabilities.

    Raises:
        ConfigError: they may leave [0, 1].
    """
    low, high = _range(head)
    if low < 0 or high > 1:
        raise ConfigError(
            f"--scale probability takes values for chances of success, and the critic's head ({head.kind}) says values "
            f"from {low:g} to {high:g}; take a critic of chances (bernoulli from 0 to 1), --scale logit, or --rule tilt"
        )


def _range(head: Head) -> tuple[float, float]:
    # Heads differ in how they say it, and some are bounded by nothing.
    rewards, bounds = getattr(head, "rewards", None), getattr(head, "bounds", None)
    if rewards is not None:
        return min(rewards), max(rewards)
    if bounds is not None:
        return bounds
    return getattr(head, "low", -float("inf")), getattr(head, "high", float("inf"))
