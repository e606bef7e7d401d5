"""A recipe's critic without the rest of a run: its policy does not learn, and nothing is sampled."""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmac.config import Recipe
from llmac.core.protocols import Completion, Critic, Observer, Request
from llmac.core.types import Trajectory
from llmac.critics.bench import CriticBench, Shippable
from llmac.errors import ConfigError
from llmac.models.loading import load_causal_lm, torch_dtype
from llmac.models.packing import PackedRows
from llmac.models.policy import TokenPolicy
from llmac.runtime.context import Runtime


class LearnedCritic(Critic, Shippable, Protocol):
    """A critic with weights, that is a folder in the end."""


def critic_of(recipe: Recipe, runtime: Runtime, *, pad_id: int, steps: int) -> LearnedCritic:
    """The live critic that the recipe names.

    Args:
        recipe: names the critic, the model and the sizes.
        runtime: the process group.
        pad_id: any token id.
        steps: times that `update` will be called; the end of the critic's schedule.

    Raises:
        ConfigError: the recipe has no critic, or one that has nothing to learn from stored rollouts.
    """
    check_critic(recipe)
    assert recipe.critic is not None
    compute_dtype = torch.bfloat16 if recipe.model.compute_dtype else None
    # Other critics may look at the policy, too; one with its own trunk does not, and the memory is better spent.
    needed = getattr(recipe.critic.settings, "trunk", None) != "own"
    policy = _policy(recipe, runtime, needed=needed)
    frozen = runtime.freeze(policy, compute_dtype=compute_dtype) if needed else None

    @torch.no_grad()
    def states(rows: PackedRows) -> Tensor:
        assert frozen is not None, "a critic with its own trunk does not ask for the policy's"
        return frozen(rows, hidden_only=True)[0]

    nobody = Nobody()
    bench = CriticBench(
        runtime=runtime,
        model=recipe.model,
        policy=policy,
        policy_states=states,
        engine=nobody,
        score=nobody,
        pad_id=pad_id,
        packing=recipe.actor.packing,
        minibatches=recipe.actor.minibatches,
        max_tokens_per_microbatch=recipe.actor.max_tokens_per_microbatch,
        steps=steps,
        compute_dtype=compute_dtype,
        before_learning=nobody.sleep,
    )
    critic = recipe.critic.settings.build(bench)
    if not isinstance(critic, Shippable) or isinstance(critic, Observer):
        raise ConfigError(
            f"critic {recipe.critic.name} does not learn from returns; choose a value model, for example "
            "critic: {name: value_head}"
        )
    return cast(LearnedCritic, critic)


def check_critic(recipe: Recipe) -> None:
    """Refuse, before anything is loaded, recipes whose critic cannot be pre-trained.

    Raises:
        ConfigError: what is wrong and what to set.
    """
    if recipe.critic is None:
        raise ConfigError(
            f"{recipe.algorithm.name} uses no critic: there is nothing to pre-train. Name an algorithm that has one, "
            "for example algorithm.name=ppo"
        )
    settings = recipe.critic.settings
    shared = getattr(settings, "trunk", "own") == "shared"  # not every critic has a trunk
    if shared and not getattr(settings, "detach_trunk", True):
        raise ConfigError(
            "critic.detach_trunk: false would move the policy, which value pre-training leaves as it is; set "
            "critic.detach_trunk=true, or critic.trunk=own"
        )


def _policy(recipe: Recipe, runtime: Runtime, *, needed: bool) -> TokenPolicy:
    """The policy as it starts; without memory for its weights unless they are `needed`."""
    spec = recipe.model
    if needed:
        with runtime.loading(torch_dtype(spec)):
            model = load_causal_lm(spec)
    else:
        trust: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        config = AutoConfig.from_pretrained(spec.name, revision=spec.revision, **trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **trust)
    return TokenPolicy(
        model, temperature=recipe.rollout.temperature, chunk_mb=spec.logprob_chunk_mb
    )


class Nobody:
    """Stands where an engine and a scorer stand in a run, and can do neither's work."""

    policy_version = 0

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Raise: stored rollouts are all there is."""
        self._refuse()

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Raise, as `generate` does."""
        self._refuse()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Raise: the policy does not move."""
        self._refuse()

    def sleep(self) -> None:
        """Nothing to free."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to release."""

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            "this critic wants to sample, and value pre-training has stored rollouts only; choose a value model, for "
            "example critic: {name: value_head}"
        )
