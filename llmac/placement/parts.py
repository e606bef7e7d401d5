"""The modules of a run: what each costs one GPU, and what its passes leave there."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from llmac.config.schema import Recipe
from llmac.critics.head_config import HeadConfig
from llmac.placement.activations import (
    Precision,
    backward_bytes,
    backward_cast_bytes,
    cast_bytes,
    kept_bytes,
    logits_bytes,
)
from llmac.placement.second_engines import writing_critic
from llmac.placement.sharding import Held, Sharding, held
from llmac.placement.skeletons import (
    Skeleton,
    bare_skeleton,
    critic_skeleton,
    policy_skeleton,
    reward_skeleton,
)
from llmac.second_models import critic_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Bytes on one GPU."""

    policy_shape: Skeleton
    critic_shape: Skeleton | None
    policy: Held
    critic: Held
    reference: Held
    rewards: int
    policy_moments: tuple[Mapping[str, int], ...]
    """The end of the forward pass and the begin of the backward pass, each item by its name."""
    critic_moments: tuple[Mapping[str, int], ...]
    loaded: int
    """The largest model, whole, as every rank reads it into main memory."""

    @classmethod
    def of(
        cls, recipe: Recipe, sharding: Sharding, ranks: int, tokens: int, critic_row: int
    ) -> "Parts":
        """Those of a recipe.

        Args:
            recipe: the run.
            sharding: how training is spread.
            ranks: GPUs that train.
            tokens: of the largest micro-batch.
            critic_row: of the longest row that a critic learns from which writes.
        """
        spec = recipe.model
        policy = policy_skeleton(spec)
        settings, writer = head_settings(recipe), writing_critic(recipe)
        critic = critic_skeleton(spec, settings) if settings is not None else None
        critic_tokens = tokens
        if writer is not None and writer.learns:
            model = critic_model(recipe)
            assert model is not None, "a critic that writes is a model"
            critic = policy_skeleton(model)
            budget = writer.max_tokens_per_microbatch or recipe.actor.max_tokens_per_microbatch
            critic_tokens = max(budget, critic_row)
        reference: Skeleton | None = None
        if recipe.algorithm.settings.uses_reference and not (spec.lora and not spec.reference):
            reference = bare_skeleton(spec, spec.reference)
        rewards = [reward_skeleton(f.model) for f in recipe.reward.functions if f.model is not None]
        precision: Precision = spec.dtype
        if spec.dtype == "float32" and spec.compute_dtype:
            precision = "autocast"
        cached = sharding is Sharding.DDP  # as llmac.runtime.context enters autocast

        def moments(model: Skeleton, tokens: int) -> tuple[dict[str, int], ...]:
            sizes = {"gradient_checkpointing": spec.gradient_checkpointing}
            forward_ends = {
                "bfloat16 copies of weights": cast_bytes(model, precision, cached=cached),
                "activations": kept_bytes(model, tokens, precision, **sizes),
            }
            backward_begins = {
                "bfloat16 copies of weights": backward_cast_bytes(model, precision, **sizes),
                "activations": backward_bytes(model, tokens, precision, **sizes),
            }
            return forward_ends, backward_begins

        def with_logits(model: Skeleton, tokens: int) -> tuple[Mapping[str, int], ...]:
            logits = {"logits": logits_bytes(model, tokens, spec.logprob_chunk_mb)}
            return tuple(moment | logits for moment in moments(model, tokens))

        # A head on the policy's trunk sees hidden vectors that were computed without gradient.
        critic_moments: tuple[Mapping[str, int], ...] = ()
        if critic is not None and settings is None:
            critic_moments = with_logits(critic, critic_tokens)
        elif critic is not None and settings is not None and settings.trunk == "own":
            critic_moments = moments(critic, tokens)
        return cls(
            policy_shape=policy,
            critic_shape=critic,
            policy=held(policy, sharding, ranks),
            critic=_critic_held(settings, critic, sharding, ranks),
            reference=held(reference, sharding, ranks) if reference is not None else Held(),
            rewards=sum(model.bytes for model in rewards),
            policy_moments=with_logits(policy, tokens),
            critic_moments=critic_moments,
            loaded=max(
                model.bytes for model in (policy, critic, reference, *rewards) if model is not None
            ),
        )


def head_settings(recipe: Recipe) -> HeadConfig | None:
    """Of a critic that is a head on a language model; None: no critic, or one without a head."""
    settings = recipe.critic.settings if recipe.critic else None
    return settings if isinstance(settings, HeadConfig) else None


def _critic_held(
    settings: HeadConfig | None, critic: Skeleton | None, sharding: Sharding, ranks: int
) -> Held:
    if critic is None:
        return Held()
    alone = held(critic, sharding, ranks)
    if settings is None or settings.target_tau is None:
        return alone
    return dataclasses.replace(alone, parameters=2 * alone.parameters)  # the target network
