"""Will a recipe fit: GPUs divided, its phases added up, and what is too much."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmac.config.schema import Recipe
from llmac.config.traits import plan_of, traits_of
from llmac.core.protocols import WritesPrompts
from llmac.errors import ConfigError
from llmac.placement.parts import Parts
from llmac.placement.phases import Phase, phases_of
from llmac.placement.sampling import GIB, Sampler, hf_sampler, vllm_sampler
from llmac.placement.second_engines import (
    Lengths,
    SecondEngine,
    check_shapes,
    second_engines,
    writing_critic,
)
from llmac.placement.sharding import Sharding
from llmac.placement.skeletons import Skeleton, bare_skeleton
from llmac.second_models import critic_model
from llmac.serve import gpu_share

USUAL_PROMPT = 512
"""Tokens of a prompt where neither data.max_prompt_tokens nor --prompt-tokens says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """The hardware, and how training is spread over it."""

    gpus: int
    """On each machine."""
    gpu_gib: float
    """Memory of one GPU, GiB."""
    nodes: int = 1
    sharding: Sharding = Sharding.DDP

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for flag, value in (("--gpus", self.gpus), ("--nodes", self.nodes)):
            if value < 1:
                raise ConfigError(f"{flag} is {value}; expected at least 1")
        if not 0 < self.gpu_gib < math.inf:
            raise ConfigError(
                f"--gpu-memory is {self.gpu_gib:g}; expected the GiB of one GPU, for example 80"
            )

    @property
    def gpu_memory(self) -> int:
        """Bytes of one GPU."""
        return int(self.gpu_gib * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer."""

    machines: Machines
    training_gpus: int
    serving_gpus: int
    """GPUs that sample and do nothing else."""
    policy: Skeleton
    critic: Skeleton | None
    phases: tuple[Phase, ...]
    """The last one is a server's, if there are servers."""
    sampler: Sampler
    seconds: tuple[SecondEngine, ...]
    """Engines of other models beside it."""
    lengths: Lengths
    micro_batch: int
    """Tokens of the policy's largest forward pass."""
    row_tokens: int
    """Tokens of the longest prompt and response together."""
    host_start: int
    """Main memory of one machine while models are loaded."""
    host: int
    """Main memory of one machine afterwards."""
    problems: tuple[str, ...]
    """What does not fit, one sentence each; empty: everything does."""
    shortfall: int
    """Bytes missing, over all problems: the smaller, the closer."""

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def plan(recipe: Recipe, machines: Machines, *, prompt_tokens: int | None = None) -> Plan:
    """Memory of every phase of a run on these machines.

    Args:
        recipe: the run.
        machines: the GPUs and how training is spread.
        prompt_tokens: the longest prompt; None: data.max_prompt_tokens, or `USUAL_PROMPT`.

    Raises:
        ConfigError: no model configuration, or numbers that do not divide each other.
    """
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ConfigError(f"--prompt-tokens is {prompt_tokens}; expected at least 1")
    training, serving = _divide(recipe, machines)
    rows = _rows_per_rank(recipe, training)
    prompt = prompt_tokens or recipe.data.max_prompt_tokens or USUAL_PROMPT
    lengths = Lengths.of(recipe, prompt)
    longest = lengths.row
    # A row longer than the budget is a micro-batch by itself; fewer rows than the budget holds are all there is.
    part = -(-rows // recipe.actor.minibatches)
    micro_batch = min(max(recipe.actor.max_tokens_per_microbatch, longest), part * longest)
    parts = Parts.of(recipe, machines.sharding, training, micro_batch, lengths.critic_row)
    sampler = _sampler(recipe, machines, lengths, rows, prompt_tokens)
    seconds = second_engines(recipe, lengths, gpu_memory=machines.gpu_memory)
    phases = phases_of(recipe, parts, sampler, seconds, several=training > 1)
    problems, shortfall = _problems(phases, sampler, seconds, machines.gpu_memory, longest)
    # Engines are asleep, and their weights in main memory, while the policy learns.
    per_node = min(machines.gpus, training)
    return Plan(
        machines=machines,
        training_gpus=training,
        serving_gpus=serving,
        policy=parts.policy_shape,
        critic=parts.critic_shape,
        phases=phases,
        sampler=sampler,
        seconds=tuple(seconds),
        lengths=lengths,
        micro_batch=micro_batch,
        row_tokens=longest,
        host_start=per_node * parts.loaded,
        host=per_node * (parts.policy.host + parts.critic.host + sampler.host),
        problems=problems,
        shortfall=shortfall,
    )


def _sampler(
    recipe: Recipe, machines: Machines, lengths: Lengths, rows: int, prompt_tokens: int | None
) -> Sampler:
    """The policy's engine, which a critic may share."""
    bare, rollout = bare_skeleton(recipe.model), recipe.rollout
    critic = writing_critic(recipe)
    shared = critic is not None and critic.engine == "shared"
    if shared and (model := critic_model(recipe)) is not None:
        check_shapes(bare, bare_skeleton(model), model.name)
    if rollout.engine == "hf":
        # A critic that asks at states asks for more at a time than the engine takes.
        asks = shared or traits_of(recipe.critic).continuations > 0
        asked = max(rows, rollout.max_num_seqs) if asks else rows
        requests = [(lengths.read, rollout)]
        if shared:
            writes = rollout.model_copy(update={"max_new_tokens": lengths.critic_written})
            requests.append((lengths.critic_read, writes))
        samplers = [
            hf_sampler(bare, recipe.model, asking, rows=asked, prompt_tokens=read)
            for read, asking in requests
        ]
        return max(samplers, key=lambda each: sum(each.awake.values()))
    return vllm_sampler(
        bare,
        recipe.model,
        rollout,
        gpu_memory=machines.gpu_memory,
        share=share_of(recipe),
        longest=_engine_context(recipe, bare, prompt_tokens),
    )


def share_of(recipe: Recipe) -> float:
    """Fraction of a GPU that vLLM takes."""
    serves = recipe.rollout.engine == "vllm_server"
    return gpu_share(recipe) if serves else recipe.rollout.gpu_memory_utilization


def _engine_context(recipe: Recipe, model: Skeleton, prompt_tokens: int | None) -> int:
    """Tokens a vLLM engine is started for: the recipe's, else the longest request's, if its length is known here."""
    rollout, evaluation = recipe.rollout, recipe.evaluation
    context = model.context or 0
    prompt = prompt_tokens or recipe.data.max_prompt_tokens
    own_words = (
        isinstance(plan_of(recipe), WritesPrompts) or traits_of(recipe.critic).writes_prompts
    )
    if rollout.max_model_len or rollout.servers or prompt is None or own_words:
        return rollout.max_model_len or context  # `llmac serve` sees no prompts
    longest = prompt + rollout.max_new_tokens
    if evaluation is not None:
        held_out = evaluation.data.max_prompt_tokens or prompt
        longest = max(longest, held_out + (evaluation.max_new_tokens or rollout.max_new_tokens))
    return min(longest, context or longest)


def _divide(recipe: Recipe, machines: Machines) -> tuple[int, int]:
    """GPUs that train, and GPUs that only sample."""
    rollout, gpus = recipe.rollout, machines.gpus * machines.nodes
    span = rollout.tensor_parallel_size
    if rollout.engine == "vllm_server":
        if rollout.servers:  # started elsewhere: all the GPUs here train
            return gpus, len(rollout.servers) * span
        serving = rollout.server_count * span
        if serving >= gpus:
            raise ConfigError(
                f"rollout.server_count {rollout.server_count} x rollout.tensor_parallel_size {span} take {serving} of "
                f"{gpus} GPUs, and none is left to train; lower one of them, or name servers elsewhere in "
                "rollout.servers"
            )
        return gpus - serving, serving
    if rollout.engine == "vllm" and machines.gpus % span:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {span}, which does not divide the {machines.gpus} GPUs of a machine; "
            "neighbouring processes share an engine. Take a divisor, or rollout.engine=vllm_server"
        )
    return gpus, 0


def _rows_per_rank(recipe: Recipe, ranks: int) -> int:
    """Responses a rank samples and learns from in a step."""
    prompts, parts = recipe.actor.prompts_per_step, recipe.actor.minibatches
    if prompts % (ranks * parts):
        raise ConfigError(
            f"actor.prompts_per_step is {prompts}, which {ranks} processes x {parts} minibatches do not divide; "
            f"take a multiple of {ranks * parts}"
        )
    return prompts // ranks * recipe.algorithm.settings.group_size


def _problems(
    phases: tuple[Phase, ...],
    sampler: Sampler,
    seconds: Sequence[SecondEngine],
    gpu_memory: int,
    row_tokens: int,
) -> tuple[tuple[str, ...], int]:
    found: list[str] = []
    missing = 0
    for phase in phases:
        over = phase.total - gpu_memory
        if over > 0:
            largest = max(phase.items, key=lambda item: phase.items[item])
            found.append(
                f"{phase.name}: {over / GIB:.1f} GiB too much; the largest part is {largest}, "
                f"{phase.items[largest] / GIB:.1f} GiB"
            )
            missing += over
    engines = [("sampler", sampler, row_tokens)]
    engines += [(second.item, second.sampler, second.row) for second in seconds]
    for name, engine, row in engines:
        wanted = max(row, engine.longest)
        if engine.cache < 0:
            found.append(
                f"{name}: {-engine.cache / GIB:.1f} GiB more for weights and working memory than "
                "rollout.gpu_memory_utilization allows"
            )
            missing -= engine.cache
        elif engine.cache_tokens < wanted:
            found.append(
                f"{name}: the cache holds {engine.cache_tokens} tokens, and one response may have {wanted}"
            )
            tokens = wanted - engine.cache_tokens
            missing += tokens * engine.cache // max(1, engine.cache_tokens)
    return tuple(found), missing
