"""What the types cannot say: keys that would do nothing, and values that do not go together.

Only keys the user wrote are complained about; a default that does nothing is left alone, and `dump`
leaves it out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmac.config.cards import Choice, idle_fields
from llmac.config.critic_fit import critic_that_does_not_fit
from llmac.config.schema import DataConfig, Recipe, Section
from llmac.config.traits import learns, partner_of, plan_of, traits_of
from llmac.config.words import found
from llmac.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Idle:
    """Keys that nothing reads while `when` holds."""

    keys: tuple[str, ...]
    when: Callable[[Recipe], bool]
    because: str


IDLE = (
    Idle(
        tuple(
            f"rollout.{key}"
            for key in (
                "dtype",
                "max_model_len",
                "gpu_memory_utilization",
                "kv_cache_mb",
                "enforce_eager",
                "tensor_parallel_size",
            )
        ),
        lambda recipe: recipe.rollout.engine == "hf",
        "it is a setting of vLLM, and rollout.engine is hf; remove it, or set rollout.engine: vllm",
    ),
    Idle(
        ("rollout.sleep_level",),
        lambda recipe: recipe.rollout.engine != "vllm",
        "only vLLM in process shares memory with the trainer; remove it, or set rollout.engine: vllm",
    ),
    Idle(
        tuple(
            f"rollout.{key}"
            for key in ("servers", "server_count", "weight_transport", "request_timeout_seconds")
        ),
        lambda recipe: recipe.rollout.engine != "vllm_server",
        "no server samples here; remove it, or set rollout.engine: vllm_server",
    ),
    Idle(
        ("actor.min_lr_ratio",),
        lambda recipe: recipe.actor.schedule == "constant",
        "a constant schedule does not decay; remove it, or set actor.schedule: linear or cosine",
    ),
    Idle(
        ("model.compute_dtype",),
        lambda recipe: recipe.model.dtype == "bfloat16" and recipe.model.compute_dtype is not None,
        "with model.dtype: bfloat16 everything is computed in bfloat16 already; remove one of the two",
    ),
    Idle(
        ("model.reference",),
        lambda recipe: not recipe.algorithm.settings.uses_reference,
        "the algorithm has no KL term; remove it, or set algorithm.kl_coef above 0",
    ),
    Idle(
        ("run.critic_warmup_steps", "run.critic_warmup_explained", "run.policy_every"),
        lambda recipe: not _teaches_a_critic(recipe),
        "the algorithm uses no critic, or none that learns; remove it, or choose both, for example ppo and value_head",
    ),
    Idle(
        ("run.project",),
        lambda recipe: not recipe.run.trackers,
        "only trackers show it; remove it, or set run.trackers, for example [tensorboard]",
    ),
)


def _teaches_a_critic(recipe: Recipe) -> bool:
    card = recipe.algorithm.settings
    return card.uses_values and card.teaches_critic and learns(recipe.critic)


def idle_keys(recipe: Recipe) -> dict[str, str]:
    """Dotted keys that do nothing in this recipe, with the reason; written by the user or not."""
    idle = {key: rule.because for rule in IDLE if rule.when(recipe) for key in rule.keys}
    for name, data in data_sections(recipe):
        if data.chat == "never":
            idle[f"{name}.system"] = f"{name}.chat is never; remove one of the two"
    for index, function in enumerate(recipe.reward.functions):
        if function.model is not None:
            idle[f"reward.functions[{index}].adapter"] = (
                "a reward model has no signature to adapt; remove it"
            )
    for room, choice in _choices(recipe):
        for key, because in idle_fields(choice.settings).items():
            idle[f"{room}.{key}"] = because
    return idle


def given(recipe: Recipe, key: str) -> bool:
    """Whether the user wrote this key, in the file or as an override."""
    room, _, rest = key.partition(".")
    node: Any = getattr(recipe, room)
    if isinstance(node, Choice):
        return rest in node.given
    *parents, last = rest.replace("[", ".").replace("]", "").split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return isinstance(node, Section) and last in node.model_fields_set


def check_effects(recipe: Recipe) -> None:
    """Refuse keys the user wrote and nothing would read.

    Raises:
        ConfigError: naming every such key and what to do.
    """
    lines = [
        f"{key} has no effect: {because}"
        for key, because in idle_keys(recipe).items()
        if given(recipe, key)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def check_sense(recipe: Recipe) -> None:
    """Refuse values that do not go together.

    Raises:
        ConfigError: naming all of them.
    """
    lines = list(_contradictions(recipe))
    if lines:
        raise ConfigError("\n".join(lines))


def _contradictions(recipe: Recipe) -> Iterator[str]:
    actor, rollout, evaluation = recipe.actor, recipe.rollout, recipe.evaluation
    if actor.prompts_per_step % actor.minibatches:
        below = actor.prompts_per_step - actor.prompts_per_step % actor.minibatches
        yield (
            f"actor.prompts_per_step must be divisible by actor.minibatches so that minibatches are equal, found "
            f"{actor.prompts_per_step} and {actor.minibatches}; {below or actor.minibatches} prompts would do"
        )
    for key, value, off in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if value != off:
            yield (
                f"rollout.{key} must be {off} in training, found {value}. Cutting the tail of the sampler makes the "
                "mean importance ratio the kept probability mass instead of 1, which biases every update; leave it "
                f"at {off}, and sharpen with rollout.temperature if you must (training divides by it too)"
            )
    low, high = actor.betas
    if not (0 <= low < 1 and 0 <= high < 1):
        yield f"actor.betas must each be at least 0 and below 1, found {found(list(actor.betas))}"
    if rollout.max_model_len is not None and rollout.max_model_len <= rollout.max_new_tokens:
        yield (
            f"rollout.max_model_len ({rollout.max_model_len}) must leave room for a prompt beside "
            f"rollout.max_new_tokens ({rollout.max_new_tokens})"
        )
    if evaluation is not None and evaluation.temperature == 0 and evaluation.samples > 1:
        yield (
            f"evaluation.samples is {evaluation.samples} at temperature 0, where all samples are the same; set "
            "evaluation.temperature above 0, or samples to 1"
        )
    if (
        getattr(recipe.critic and recipe.critic.settings, "lora", False)
        and recipe.model.lora is None
    ):  # cards differ
        yield "critic.lora takes its sizes from model.lora, which is not set; set model.lora, or critic.lora: false"
    yield from _plan_that_cannot_be(recipe)
    yield from critic_that_does_not_fit(recipe)
    for index, function in enumerate(recipe.reward.functions):
        if (function.path is None) == (function.model is None):
            both = "both" if function.path is not None else "neither"
            yield f"reward.functions[{index}] must have either path or model, found {both}"
    for name, data in data_sections(recipe):
        if data.prompt is not None and data.prompt_column is not None:
            yield (
                f"{name}.prompt and {name}.prompt_column both say what the prompt is; keep the template or the column"
            )
    yield from _same_names(recipe)


def _plan_that_cannot_be(recipe: Recipe) -> Iterator[str]:
    try:
        partner = partner_of(recipe)
    except ValueError as error:
        yield f"algorithm {recipe.algorithm.name}: {error}"
        return
    if (
        recipe.evaluation is not None and getattr(plan_of(recipe), "trains", None) == "critic"
    ):  # plans differ
        yield (
            f"evaluation would have the policy answer questions, and the policy of {recipe.algorithm.name} is the "
            "critic; remove evaluation: critique/* among the metrics says how its critiques do"
        )
    others = {f"algorithm {recipe.algorithm.name}": partner is not None}
    if recipe.critic is not None:
        others[f"critic {recipe.critic.name}"] = traits_of(recipe.critic).engine is not None
    for who, samples in others.items():
        if samples and recipe.rollout.engine == "vllm_server":
            yield (
                f"{who} samples from a second language model, and rollout.engine is vllm_server, whose servers have "
                "the policy; set rollout.engine: vllm or hf"
            )


def _same_names(recipe: Recipe) -> Iterator[str]:
    names = [function.name for function in recipe.reward.functions if function.name is not None]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"reward.functions: two functions are named {name!r}; their metrics would be one"


def data_sections(recipe: Recipe) -> Iterator[tuple[str, DataConfig]]:
    """Name and content of every section that describes a dataset."""
    yield "data", recipe.data
    if recipe.evaluation is not None:
        yield "evaluation.data", recipe.evaluation.data


def _choices(recipe: Recipe) -> Iterator[tuple[str, Choice]]:
    yield "algorithm", recipe.algorithm
    if recipe.critic is not None:
        yield "critic", recipe.critic
