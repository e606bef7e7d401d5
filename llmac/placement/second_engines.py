"""Language models that sample beside the policy: how long what they read and write is, and what their engines cost."""

from dataclasses import dataclass

from llmac.config.schema import Recipe, RolloutConfig
from llmac.config.traits import plan_of
from llmac.core.protocols import WritesPrompts
from llmac.critics.generative import GenerativeConfig
from llmac.errors import ConfigError
from llmac.models.loading import ModelSpec
from llmac.placement.sampling import Sampler, hf_sampler, vllm_sampler
from llmac.placement.skeletons import Skeleton, bare_skeleton
from llmac.second_models import critic_model, partner_model

INSTRUCTIONS = 512
"""Tokens of what one model is told about the words of another, those words apart. Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of what a run's models read and write."""

    prompt: int
    """Of the data's longest prompt."""
    response: int
    """Of the longest response."""
    read: int
    """Of the longest prompt the policy is asked about: longer than the data's where a plan writes prompts."""
    critic_read: int
    """Of the longest prompt of a critic that writes; 0: there is none."""
    critic_written: int
    """Of what it writes."""

    @classmethod
    def of(cls, recipe: Recipe, prompt: int) -> "Lengths":
        """Those of a recipe.

        Args:
            recipe: the run.
            prompt: tokens of the data's longest prompt.
        """
        response = recipe.rollout.max_new_tokens
        read = prompt
        if isinstance(plan_of(recipe), WritesPrompts):  # about an answer, and about its critique
            read = prompt + INSTRUCTIONS + 2 * response
        critic = writing_critic(recipe)
        if critic is None:
            return cls(prompt=prompt, response=response, read=read, critic_read=0, critic_written=0)
        shown = critic.attempts if critic.conditioning in ("attempts", "both") else 0
        critic_read = INSTRUCTIONS + shown * (prompt + critic.attempt_tokens) + prompt + response
        return cls(
            prompt=prompt,
            response=response,
            read=read,
            critic_read=min(critic_read, critic.max_prompt_tokens or critic_read),
            critic_written=critic.max_new_tokens,
        )

    @property
    def row(self) -> int:
        """Of the longest row the policy learns from."""
        return self.read + self.response

    @property
    def critic_row(self) -> int:
        """Of the longest row a critic that writes learns from."""
        return self.critic_read + self.critic_written


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondEngine:
    """An engine beside the policy's."""

    whose: str
    """critic or partner."""
    sampler: Sampler
    row: int
    """Tokens of its longest prompt and answer together."""

    @property
    def item(self) -> str:
        """What its bytes are called."""
        return f"{self.whose}'s engine"

    @property
    def at_rest(self) -> int:
        """Bytes while it is not asked: vLLM's second engine never sleeps."""
        return sum(self.sampler.asleep.values())

    @property
    def at_work(self) -> int:
        """Bytes while it samples."""
        return sum(self.sampler.awake.values())

    @property
    def loading(self) -> int:
        """Bytes while new weights arrive, their bucket apart."""
        return sum(self.sampler.loading.values())


def writing_critic(recipe: Recipe) -> GenerativeConfig | None:
    """Settings of a critic that is a language model and writes; None: it is none."""
    settings = recipe.critic.settings if recipe.critic else None
    return settings if isinstance(settings, GenerativeConfig) else None


def second_engines(recipe: Recipe, lengths: Lengths, *, gpu_memory: int) -> list[SecondEngine]:
    """Those of a critic with an engine of its own, and of a partner.

    Args:
        recipe: the run.
        lengths: of what is read and written.
        gpu_memory: bytes of a GPU.

    Raises:
        ConfigError: servers sample, which have one model.
    """
    found: list[SecondEngine] = []
    critic, partner = writing_critic(recipe), partner_model(recipe)
    if critic is not None and critic.engine == "own":
        model = critic_model(recipe)
        assert model is not None, "a critic that writes is a model"
        most = critic.max_prompt_tokens and critic.max_prompt_tokens + critic.max_new_tokens
        sampler = _sampler(
            recipe,
            model,
            gpu_memory,
            read=lengths.critic_read,
            written=lengths.critic_written,
            longest=most,
        )
        found.append(SecondEngine(whose="critic", sampler=sampler, row=lengths.critic_row))
    if partner is not None:
        sampler = _sampler(
            recipe, partner, gpu_memory, read=lengths.read, written=lengths.response, longest=None
        )
        found.append(SecondEngine(whose="partner", sampler=sampler, row=lengths.row))
    return found


def check_shapes(policy: Skeleton, critic: Skeleton, name: str) -> None:
    """Refuse a critic whose weights the policy's engine cannot have.

    Raises:
        ConfigError: their shapes differ.
    """
    ours, theirs = ([weight.shape for weight in model.weights] for model in (critic, policy))
    if ours != theirs:
        raise ConfigError(
            f"critic.engine: shared needs the architecture of the policy, and {name} has other weights; set "
            "critic.engine: own"
        )


def _sampler(
    recipe: Recipe,
    model: ModelSpec,
    gpu_memory: int,
    *,
    read: int,
    written: int,
    longest: int | None,
) -> Sampler:
    """With the settings of the recipe's `rollout` section, except that it does not sleep."""
    bare = bare_skeleton(model)
    rollout: RolloutConfig = recipe.rollout.model_copy(
        update={"max_new_tokens": written, "sleep_level": 0}
    )
    if rollout.engine == "hf":
        # More is asked at a time than the engine takes.
        rows = rollout.max_num_seqs
        return hf_sampler(bare, recipe.model, rollout, rows=rows, prompt_tokens=read)
    if rollout.engine == "vllm_server":
        raise ConfigError(
            f"{model.name} is a second model to sample from, and rollout.engine is vllm_server, whose servers have "
            "the policy; set rollout.engine: vllm or hf"
        )
    return vllm_sampler(
        bare,
        recipe.model,
        rollout,
        gpu_memory=gpu_memory,
        share=rollout.gpu_memory_utilization,
        longest=rollout.max_model_len or longest or bare.context or 0,
    )
