"""A file of rollouts and a recipe: whether the one can teach the critic of the other."""

import logging
from collections.abc import Sequence
from pathlib import Path

from llmac.config import Recipe
from llmac.core.value_heads import Head
from llmac.errors import ConfigError, DataError
from llmac.models.loading import check_vocabulary, load_tokenizer
from llmac.pretraining.rows import Example, examples_of
from llmac.rollout_store import StoredRollouts, read_store, vocabulary_mark

logger = logging.getLogger(__name__)

SLACK = 0.05
"""How far from a reward the nearest value of a head may be, as a fraction of the rewards' size: a probability is never
quite 1."""


def examples_in(path: Path, recipe: Recipe) -> list[Example]:
    """What the recipe's critic can learn from a file. No model is loaded.

    Raises:
        DataError: there is nothing to learn from, or the token ids are of another vocabulary.
        ConfigError: the critic's head cannot say such rewards.
    """
    stored = rollouts_in(path, recipe)
    skip = recipe.algorithm.settings.mask_truncated
    examples = examples_of(stored, path, skip_truncated=skip)
    _check_range(recipe, examples, path)
    return examples


def rollouts_in(path: Path, recipe: Recipe) -> StoredRollouts:
    """The file's responses, whose token ids mean in the recipe's model what they meant when they were sampled.

    Raises:
        DataError: the file is missing, foreign or empty, or its token ids are of another vocabulary.
    """
    stored = read_store(path)
    _check_vocabulary(recipe, stored, path)
    return stored


def say_what_there_is(path: Path, learn: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Tell the user the sizes, and warn if the rewards do not differ."""
    prompts = [len({e.trajectory.prompt.token_ids for e in part}) for part in (learn, held_out)]
    logger.info(
        "%s: %d responses to %d prompts to learn from, %d to %d others held out",
        path,
        len(learn),
        prompts[0],
        len(held_out),
        prompts[1],
    )
    rewards = {e.trajectory.reward for e in (*learn, *held_out)}
    if len(rewards) == 1:
        logger.warning(
            "%s: all %d responses have the reward %s; nothing tells them apart, and the critic will learn that number",
            path,
            len(learn) + len(held_out),
            rewards.pop(),
        )


def _check_vocabulary(recipe: Recipe, stored: StoredRollouts, path: Path) -> None:
    tokenizer = load_tokenizer(recipe.model)
    sampled_with = stored.about.get("vocabulary")
    if sampled_with is not None and sampled_with != vocabulary_mark(tokenizer.get_vocab()):
        raise DataError(
            f"{path} was sampled by {stored.about.get('model')} with another vocabulary than the tokenizer of "
            f"{recipe.model.tokenizer or recipe.model.name} has: its token ids mean something else here. Sample anew, "
            "or name the model that sampled them"
        )
    largest = max(max(t.prompt.token_ids + t.response_ids, default=0) for t in stored.trajectories)
    try:
        check_vocabulary(recipe.model, largest)
    except ConfigError as error:
        raise DataError(
            f"{path} has token {largest}, which {recipe.model.name} has no embedding for: it was sampled by another "
            "model. Sample anew, or name that model"
        ) from error


def _check_range(recipe: Recipe, examples: Sequence[Example], path: Path) -> None:
    """Ask the critic for the smallest and the largest reward; one with a support answers with what is nearest."""
    rewards = [e.trajectory.reward or 0.0 for e in examples]
    low, high = min(rewards), max(rewards)
    assert recipe.critic is not None, "checked before"
    for reward in (low, high):
        nearest = _nearest(recipe.critic.settings, reward)
        if abs(nearest - reward) > SLACK * max(abs(low), abs(high), high - low):
            raise ConfigError(
                f"critic: {recipe.critic.name} cannot say {reward:.4g}, a reward in {path}; the nearest it "
                f"can is {nearest:.4g}. The rewards there go from {low:.4g} to {high:.4g}: let critic.reward_range "
                "cover them, or what else says the range of this critic (support, rewards)"
            )


def _nearest(settings: object, reward: float) -> float:
    """The value nearest to a reward that a critic can say, as far as its settings tell."""
    head_of = getattr(settings, "head", None)  # not every critic is a head on a language model
    head = head_of() if callable(head_of) else None
    if isinstance(head, Head):
        return float(head.decode(head.start(reward)))
    low, high = getattr(settings, "reward_range", (reward, reward))
    return min(max(reward, low), high)
