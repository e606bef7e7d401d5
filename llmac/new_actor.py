"""A language model that learns, made from what a recipe says: the policy, or a critic that writes."""

import logging
from collections.abc import Callable

import torch
from peft import PeftModel

from llmac.actor import Actor, Reference
from llmac.config.schema import ModelConfig, Recipe
from llmac.critics.bench import PolicyOrder
from llmac.models.loading import (
    LanguageModel,
    ModelSpec,
    add_lora,
    load_causal_lm,
    torch_dtype,
    train_in_full_mode,
)
from llmac.models.packing import Packing
from llmac.models.policy import TokenPolicy
from llmac.new_engine import engine_dtype
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization

logger = logging.getLogger(__name__)


def order_of(recipe: Recipe) -> PolicyOrder:
    """The recipe's policy."""
    settings = recipe.actor
    steps = (recipe.run.steps - recipe.run.critic_warmup_steps) // recipe.run.policy_every
    if steps <= 0:
        logger.warning(
            "run.critic_warmup_steps is %d and run.steps is %d: the policy does not learn in this run",
            recipe.run.critic_warmup_steps,
            recipe.run.steps,
        )
    return PolicyOrder(
        name="actor",
        model=recipe.model,
        optimization=Optimization.of(settings),
        epochs=settings.epochs,
        minibatches=settings.minibatches,
        max_tokens_per_microbatch=settings.max_tokens_per_microbatch,
        packing=settings.packing,
        temperature=recipe.rollout.temperature,
        optimizer_steps=steps * settings.epochs * settings.minibatches,
        uses_reference=recipe.algorithm.settings.uses_reference,
        reference=recipe.model.reference,
    )


def new_actor(
    order: PolicyOrder,
    recipe: Recipe,
    runtime: Runtime,
    *,
    pad_id: int,
    before_learning: Callable[[], None],
) -> tuple[Actor, TokenPolicy]:
    """The live model, and the module inside it.

    Args:
        order: which model, and how it learns.
        recipe: of it precision, tolerances and the size of what is sent to engines.
        runtime: the process group.
        pad_id: rows are padded with it.
        before_learning: called before each use; engines sleep here.
    """
    spec = order.model
    compute_dtype = torch.bfloat16 if recipe.model.compute_dtype else None

    def as_policy(model: LanguageModel) -> TokenPolicy:
        return TokenPolicy(
            model, temperature=order.temperature, chunk_mb=recipe.model.logprob_chunk_mb
        )

    with runtime.loading(torch_dtype(spec)):
        base = load_causal_lm(spec)
    model = base if spec.lora is None else add_lora(base, spec.lora)
    train_in_full_mode(model, gradient_checkpointing=spec.gradient_checkpointing)
    policy = as_policy(model)
    packing = Packing(kind=order.packing, max_tokens=order.max_tokens_per_microbatch, pad_id=pad_id)
    frozen: LanguageModel | None = None
    reference: Reference | None = None
    if order.uses_reference and isinstance(model, PeftModel) and order.reference is None:
        reference = Reference(None, model.disable_adapter)
    elif order.uses_reference:
        with runtime.loading(torch_dtype(spec)):
            frozen = load_causal_lm(spec, order.reference)
    readers = [model] if frozen is None else [model, frozen]
    packing = packing.fitting(*readers, device=runtime.device)  # before they are in shards
    if frozen is not None:
        reference = Reference(runtime.freeze(as_policy(frozen), compute_dtype=compute_dtype))
    learner = Learner(
        policy,
        order.optimization,
        runtime,
        name=order.name,
        total_steps=order.optimizer_steps,
        compute_dtype=compute_dtype,
        before_learning=before_learning,
    )
    actor = Actor(
        policy,
        learner,
        runtime,
        reference=reference,
        packing=packing,
        epochs=order.epochs,
        minibatches=order.minibatches,
        ratio_tolerance=recipe.run.ratio_tolerance,
        sync_bucket_bytes=recipe.rollout.sync_bucket_mb << 20,
        engine_dtype=engine_dtype(recipe),
    )
    return actor, policy


def model_named(spec: ModelSpec, name: str) -> ModelSpec:
    """The same settings without adapters: for another model with a tokenizer of its own, or for the recipe's."""
    assert isinstance(spec, ModelConfig), "recipes have no other"
    other = {} if name == spec.name else {"name": name, "tokenizer": None, "revision": None}
    return spec.model_copy(update={**other, "lora": None, "reference": None})
