"""Where the memory goes: for each phase of a step, what is alive on one GPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmac.config.schema import Recipe
from llmac.errors import ConfigError
from llmac.placement.activations import (
    Precision,
    backward_bytes,
    backward_cast_bytes,
    cast_bytes,
    kept_bytes,
    logits_bytes,
)
from llmac.placement.sampling import GIB, Sampler, hf_sampler, vllm_sampler
from llmac.placement.sharding import Held, Sharding, held
from llmac.placement.skeletons import (
    Skeleton,
    bare_skeleton,
    critic_skeleton,
    policy_skeleton,
    reward_skeleton,
)

CONTEXT = 1 * GIB
"""CUDA's context and the kernels loaded into it. Assumed."""
NCCL = GIB // 2
"""NCCL's communicators and their buffers. Assumed."""
FRAGMENTATION = 0.05
"""Of what PyTorch holds, lost between its blocks. Assumed."""
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
class Phase:
    """One moment of a run."""

    name: str
    items: Mapping[str, int]
    """What is alive on the fullest GPU: words -> bytes."""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items.values())


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
    micro_batch: int
    """Tokens of the largest forward pass."""
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
    longest = prompt + recipe.rollout.max_new_tokens
    # A row longer than the budget is a micro-batch by itself; fewer rows than the budget holds are all there is.
    part = -(-rows // recipe.actor.minibatches)
    micro_batch = min(max(recipe.actor.max_tokens_per_microbatch, longest), part * longest)
    parts = _Parts.of(recipe, machines.sharding, training, micro_batch)
    bare = bare_skeleton(recipe.model)
    rollout = recipe.rollout
    if rollout.engine == "hf":
        sampler = hf_sampler(bare, recipe.model, rollout, rows=rows, prompt_tokens=prompt)
    else:
        sampler = vllm_sampler(bare, recipe.model, rollout, gpu_memory=machines.gpu_memory)
    phases = _phases(recipe, parts, sampler, several=training > 1)
    problems, shortfall = _problems(phases, sampler, machines.gpu_memory, longest)
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
        micro_batch=micro_batch,
        row_tokens=longest,
        host_start=per_node * parts.loaded,
        host=per_node * (parts.policy.host + parts.critic.host + sampler.host),
        problems=problems,
        shortfall=shortfall,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The modules of a run, in bytes on one GPU."""

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
    def of(cls, recipe: Recipe, sharding: Sharding, ranks: int, tokens: int) -> "_Parts":
        spec = recipe.model
        policy = policy_skeleton(spec)
        settings = recipe.critic.settings if recipe.critic else None
        critic = critic_skeleton(spec, settings) if settings is not None else None
        reference: Skeleton | None = None
        if recipe.algorithm.settings.uses_reference and not (spec.lora and not spec.reference):
            reference = bare_skeleton(spec, spec.reference)
        rewards = [reward_skeleton(f.model) for f in recipe.reward.functions if f.model is not None]
        precision: Precision = spec.dtype
        if spec.dtype == "float32" and spec.compute_dtype:
            precision = "autocast"

        def moments(model: Skeleton) -> tuple[dict[str, int], ...]:
            sizes = {"gradient_checkpointing": spec.gradient_checkpointing}
            forward_ends = {
                "bfloat16 copies of weights": cast_bytes(model, precision),
                "activations": kept_bytes(model, tokens, precision, **sizes),
            }
            backward_begins = {
                "bfloat16 copies of weights": backward_cast_bytes(model, precision, **sizes),
                "activations": backward_bytes(model, tokens, precision, **sizes),
            }
            return forward_ends, backward_begins

        logits = {"logits": logits_bytes(policy, tokens, spec.logprob_chunk_mb)}
        # A head on the policy's trunk sees hidden vectors that were computed without gradient.
        own_trunk = settings is not None and settings.trunk == "own"
        return cls(
            policy_shape=policy,
            critic_shape=critic,
            policy=held(policy, sharding, ranks),
            critic=held(critic, sharding, ranks) if critic is not None else Held(),
            reference=held(reference, sharding, ranks) if reference is not None else Held(),
            rewards=sum(model.bytes for model in rewards),
            policy_moments=tuple(moment | logits for moment in moments(policy)),
            critic_moments=moments(critic) if critic is not None and own_trunk else (),
            loaded=max(
                model.bytes for model in (policy, critic, reference, *rewards) if model is not None
            ),
        )


def _phases(recipe: Recipe, parts: _Parts, sampler: Sampler, *, several: bool) -> tuple[Phase, ...]:
    policy, critic = parts.policy, parts.critic
    engine = recipe.rollout.engine
    nothing: Mapping[str, int] = {}
    starting, awake, asleep, loading = (
        (sampler.starting, sampler.awake, sampler.asleep, sampler.loading)
        if engine != "vllm_server"
        else (nothing, nothing, nothing, nothing)
    )
    bucket = {"sync bucket": recipe.rollout.sync_bucket_mb << 20}
    trained = {
        "policy parameters": policy.parameters,
        "critic parameters": critic.parameters,
        "reference parameters": parts.reference.parameters,
        "reward models": parts.rewards,
        "policy optimizer": policy.optimizer,
        "critic optimizer": critic.optimizer,
    }
    idle = {
        "policy gradients": policy.idle_gradients,
        "critic gradients": critic.idle_gradients,
        "buffers": policy.idle_buffers + critic.idle_buffers,
    }

    def learning(
        name: str, one: Held, other: Held, passes: tuple[Mapping[str, int], ...]
    ) -> dict[str, int]:
        """The largest of three moments: the two of the pass, and the optimizer's step."""
        moments = [{**moment, "buffers": one.buffers + other.idle_buffers} for moment in passes]
        idle_buffers = one.idle_buffers + other.idle_buffers
        moments.append({"optimizer's step": one.update, "buffers": idle_buffers})
        largest = max(moments, key=lambda moment: sum(moment.values()))
        gradients = {f"{name} gradients": one.gradients}
        return {**trained, **asleep, **idle, **gradients, **largest}

    everything = {
        # Of a run that continues: a new one has no optimizer yet.
        "start": {**trained, **idle, **starting, **bucket},
        "generate": {**trained, **idle, **awake},
        "learn policy": learning("policy", policy, critic, parts.policy_moments),
    }
    if parts.critic_shape is not None:
        everything["learn critic"] = learning("critic", critic, policy, parts.critic_moments)
    everything["sync"] = {**trained, **idle, **loading, **bucket}
    if engine == "vllm_server":
        everything["server"] = {**sampler.awake, **bucket}
    own_pool = {*sampler.awake, *sampler.asleep} if engine != "hf" else set[str]()
    return tuple(
        Phase(name=name, items=_with_rest(items, own_pool, several))
        for name, items in everything.items()
    )


def _with_rest(items: Mapping[str, int], own_pool: set[str], several: bool) -> dict[str, int]:
    """With what nobody allocates on purpose; vLLM's budget is not fragmented by the trainer."""
    held_by_torch = sum(size for word, size in items.items() if word not in own_pool)
    return {
        **items,
        "CUDA and NCCL": CONTEXT + (NCCL if several else 0),
        "fragmentation": int(FRAGMENTATION * held_by_torch),
    }


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
    phases: tuple[Phase, ...], sampler: Sampler, gpu_memory: int, row_tokens: int
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
    if sampler.cache < 0:
        found.append(
            f"sampler: {-sampler.cache / GIB:.1f} GiB more for weights and working memory than "
            "rollout.gpu_memory_utilization allows"
        )
        missing -= sampler.cache
    elif sampler.cache_tokens < max(row_tokens, sampler.longest):
        wanted = max(row_tokens, sampler.longest)
        found.append(
            f"sampler: the cache holds {sampler.cache_tokens} tokens, and one response may have {wanted}"
        )
        missing += (wanted - sampler.cache_tokens) * sampler.cache // max(1, sampler.cache_tokens)
    return tuple(found), missing
