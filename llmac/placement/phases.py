"""The moments of a step: for each, what is alive on one GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmac.config.schema import Recipe
from llmac.placement.parts import Parts
from llmac.placement.sampling import GIB, Sampler
from llmac.placement.second_engines import SecondEngine, writing_critic
from llmac.placement.sharding import Held

CONTEXT = 1 * GIB
"""CUDA's context and the kernels loaded into it. Assumed."""
NCCL = GIB // 2
"""NCCL's communicators and their buffers. Assumed."""
FRAGMENTATION = 0.05
"""Of what PyTorch holds, lost between its blocks. Assumed."""


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


def phases_of(
    recipe: Recipe,
    parts: Parts,
    sampler: Sampler,
    seconds: Sequence[SecondEngine],
    *,
    several: bool,
) -> tuple[Phase, ...]:
    """The phases of a step in their order.

    Args:
        recipe: the run.
        parts: its modules.
        sampler: its engine.
        seconds: engines beside it.
        several: whether more than one GPU trains.
    """
    policy, critic = parts.policy, parts.critic
    engine = recipe.rollout.engine
    nothing: Mapping[str, int] = {}
    starting, asleep, loading = (
        (sampler.starting, sampler.asleep, sampler.loading)
        if engine != "vllm_server"
        else (nothing, nothing, nothing)
    )
    bucket = {"sync bucket": recipe.rollout.sync_bucket_mb << 20}
    at_rest = {second.item: second.at_rest for second in seconds}
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
        gradients = {f"{name} gradients": one.gradients}
        return {**trained, **asleep, **at_rest, **idle, **gradients, **_largest(moments)}

    everything = {
        # Of a run that continues: a new one has no optimizer yet.
        "start": {**trained, **idle, **starting, **at_rest, **bucket},
        "generate": {**trained, **idle, **_sampling(sampler, seconds, engine)},
    }
    if writing_critic(recipe) is not None:
        everything["values"] = {**trained, **idle, **_asking(sampler, seconds, bucket)}
    everything["learn policy"] = learning("policy", policy, critic, parts.policy_moments)
    if parts.critic_shape is not None:
        everything["learn critic"] = learning("critic", critic, policy, parts.critic_moments)
    everything["sync"] = {**trained, **idle, **loading, **at_rest, **bucket}
    if engine == "vllm_server":
        everything["server"] = {**sampler.awake, **bucket}
    pool = {*sampler.awake, *sampler.asleep, *at_rest}
    own_pool = pool if engine != "hf" else set[str]()
    return tuple(
        Phase(name=name, items=_with_rest(items, own_pool, several))
        for name, items in everything.items()
    )


def _sampling(sampler: Sampler, seconds: Sequence[SecondEngine], engine: str) -> Mapping[str, int]:
    """The largest of what the engines take while one of those samples that the plan speaks to."""
    if engine == "vllm_server":
        return {}
    at_rest = {second.item: second.at_rest for second in seconds}
    moments = [{**sampler.awake, **at_rest}]
    for second in seconds:
        if second.whose == "partner":
            # vLLM's does not sleep in between, and its partner takes no more now than before.
            moments.append({**sampler.asleep, **at_rest, second.item: second.at_work})
    return _largest(moments)


def _asking(
    sampler: Sampler, seconds: Sequence[SecondEngine], bucket: Mapping[str, int]
) -> Mapping[str, int]:
    """The same while a critic writes: it is given its weights, and samples."""
    at_rest = {second.item: second.at_rest for second in seconds}
    own = [second for second in seconds if second.whose == "critic"]
    if not own:
        return _largest([{**sampler.loading, **at_rest, **bucket}, {**sampler.awake, **at_rest}])
    [critic] = own
    beside = {**sampler.asleep, **at_rest}
    loading = {**beside, critic.item: critic.loading, **bucket}
    return _largest([loading, {**beside, critic.item: critic.at_work}])


def _largest(moments: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
    return max(moments, key=lambda moment: sum(moment.values()))


def _with_rest(items: Mapping[str, int], own_pool: set[str], several: bool) -> dict[str, int]:
    """With what nobody allocates on purpose; vLLM's budget is not fragmented by the trainer."""
    held_by_torch = sum(size for word, size in items.items() if word not in own_pool)
    return {
        **items,
        "CUDA and NCCL": CONTEXT + (NCCL if several else 0),
        "fragmentation": int(FRAGMENTATION * held_by_torch),
    }
