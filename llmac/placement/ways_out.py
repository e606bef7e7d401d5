"""The smallest change to a recipe or its launch that fits, when the plan does not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmac.config.schema import LoraConfig, Recipe
from llmac.config.traits import plan_of
from llmac.core.protocols import WritesPrompts
from llmac.errors import ConfigError
from llmac.placement.parts import head_settings
from llmac.placement.plan import Machines, Plan, plan, share_of
from llmac.placement.sampling import Sampler
from llmac.placement.second_engines import writing_critic
from llmac.placement.sharding import Sharding

ENOUGH = 3
"""Single changes that are told; more would be a menu."""
FLAGS = {
    Sharding.ZERO1: "--zero 1",
    Sharding.ZERO2: "--zero 2",
    Sharding.ZERO3: "--zero 3",
    Sharding.ZERO3_OFFLOAD: "--offload",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WayOut:
    """Changes that together make a run fit."""

    changes: tuple[str, ...]
    """As they are written: `key=value` for the recipe, a flag of `llmac plan` for the launch."""
    highest: int
    """Bytes of the fullest phase after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sharding: Sharding | None = None
    gentle: bool = True
    """Whether what is learned stays the same."""

    @property
    def knob(self) -> str:
        """What is turned: two values of one knob exclude each other."""
        return "sharding" if self.sharding else self.words.partition("=")[0]


_Planned = Callable[[Sequence[_Change]], Plan | None]


def ways_out(
    recipe: Recipe, machines: Machines, *, prompt_tokens: int | None = None
) -> tuple[WayOut, ...]:
    """Up to three single changes that fit; one combination if none does alone; none if nothing helps.

    First those that leave the learning as it is, in the order of what they cost in speed: what the engine may take,
    recomputation, micro-batches, sharding. Only where none of them suffices, those that change it: adapters, a shared
    trunk, bfloat16 weights. Of one knob the mildest setting that fits is told.

    Args:
        recipe: the run.
        machines: the GPUs.
        prompt_tokens: as in `plan`.
    """

    def planned(changes: Sequence[_Change]) -> Plan | None:
        changed, launch = _applied(recipe, machines, changes)
        try:
            return plan(changed, launch, prompt_tokens=prompt_tokens)
        except ConfigError:  # a change that divides badly is no way out
            return None

    now = planned(())
    if now is None or now.fits:
        return ()
    candidates = list(_candidates(recipe, machines, now))
    for gentle in (True, False):
        found = _alone([change for change in candidates if change.gentle is gentle], planned)
        if found:
            return found
    gently = _together([change for change in candidates if change.gentle], planned, now)
    combined = gently or _together(candidates, planned, now)
    return (combined,) if combined is not None else ()


def _alone(candidates: list[_Change], planned: _Planned) -> tuple[WayOut, ...]:
    """The first knobs of which one setting is enough."""
    found: dict[str, WayOut] = {}
    for change in candidates:
        if change.knob not in found and len(found) < ENOUGH:
            after = planned((change,))
            if after is not None and after.fits:
                found[change.knob] = _way_out((change,), after)
    return tuple(found.values())


def _together(candidates: list[_Change], planned: _Planned, now: Plan) -> WayOut | None:
    """Always the change that helps most, until it fits; then each is left out or made milder as far as that goes."""
    chosen: tuple[_Change, ...] = ()
    best = now
    while not best.fits:
        tried = [
            (after.shortfall, position, combination, after)
            for position, change in enumerate(candidates)
            for combination in [(*_without(chosen, change.knob), change)]
            if (after := planned(combination)) is not None
        ]
        shortfall, _, combination, after = min(tried, key=lambda attempt: attempt[:2])
        if shortfall >= best.shortfall:
            return None
        chosen, best = combination, after
    for change in chosen:
        others = _without(chosen, change.knob)
        milder = [(), *((other,) for other in candidates if other.knob == change.knob)]
        for instead in milder:
            after = planned((*others, *instead))
            if after is not None and after.fits:
                chosen, best = (*others, *instead), after
                break
    return _way_out(chosen, best)


def _way_out(changes: tuple[_Change, ...], after: Plan) -> WayOut:
    return WayOut(
        changes=tuple(change.words for change in changes),
        highest=max(phase.total for phase in after.phases),
    )


def _candidates(recipe: Recipe, machines: Machines, now: Plan) -> Iterator[_Change]:
    """From the mildest to the last resort."""
    model, rollout = recipe.model, recipe.rollout
    if rollout.engine == "vllm" and rollout.sleep_level == 0:
        yield _set("rollout.sleep_level", 1)
    if rollout.engine != "hf":
        yield from _contexts(recipe, now)
        if rollout.kv_cache_mb is None:
            yield from _utilization(share_of(recipe))
    rows = rollout.max_num_seqs
    for divisor in (2, 4, 8):
        if rows // divisor >= 16:
            yield _set("rollout.max_num_seqs", rows // divisor)
    critic = writing_critic(recipe)
    if critic is not None and critic.engine == "own" and critic.learns and critic.sync_every == 1:
        yield _set("critic.engine", "shared")
    if not model.gradient_checkpointing:
        yield _set("model.gradient_checkpointing", True)
    tokens = recipe.actor.max_tokens_per_microbatch
    while tokens // 2 >= now.row_tokens:
        tokens //= 2
        yield _set("actor.max_tokens_per_microbatch", tokens)
    for chunk in (128, 64, 32):
        if chunk < model.logprob_chunk_mb:
            yield _set("model.logprob_chunk_mb", chunk)
    if now.training_gpus > 1 and machines.sharding is not Sharding.FSDP2:
        order = list(FLAGS)
        first = order.index(machines.sharding) + 1 if machines.sharding in order else 0
        for sharding in order[first:]:
            yield _Change(words=FLAGS[sharding], sharding=sharding)
    yield from _bfloat16(recipe, machines, now)
    if rollout.engine == "vllm" or rollout.servers:
        for span in (2, 4, 8):
            if span > rollout.tensor_parallel_size:
                yield _set("rollout.tensor_parallel_size", span)
    yield from _last_resorts(recipe)


def _contexts(recipe: Recipe, now: Plan) -> Iterator[_Change]:
    """Engines that promise to hold no longer requests than there are."""
    critic, lengths = writing_critic(recipe), now.lengths
    if isinstance(plan_of(recipe), WritesPrompts):
        return  # how long its prompts become is known to nobody here
    if critic is None:
        if now.sampler.longest > now.row_tokens:
            yield _set("rollout.max_model_len", now.row_tokens)
    elif any(engine.longest > lengths.critic_row for engine in _of_critic(now)):
        room = max(now.row_tokens, lengths.critic_row)
        both = {
            "rollout.max_model_len": room,
            "critic.max_prompt_tokens": room - critic.max_new_tokens,
        }
        yield _Change(words=" ".join(f"{k}={v}" for k, v in both.items()), settings=both)


def _of_critic(now: Plan) -> list[Sampler]:
    return [now.sampler, *(each.sampler for each in now.seconds if each.whose == "critic")]


def _last_resorts(recipe: Recipe) -> Iterator[_Change]:
    """What changes how or what is learned."""
    critic = head_settings(recipe)
    adapters: dict[str, Any] = {} if recipe.model.lora else {"model.lora": LoraConfig()}
    words = f"model.lora.r={LoraConfig().r}" if adapters else ""
    if critic is not None and critic.trunk == "own":
        if not critic.lora:
            both = adapters | {"critic.lora": True}
            yield _Change(words=f"{words} critic.lora=true".strip(), settings=both, gentle=False)
        yield _Change(
            words="critic.trunk=shared", settings={"critic.trunk": "shared"}, gentle=False
        )
    elif adapters:
        yield _Change(words=words, settings=adapters, gentle=False)


def _bfloat16(recipe: Recipe, machines: Machines, now: Plan) -> Iterator[_Change]:
    """Bfloat16 weights: gentle where DeepSpeed updates a float32 copy of them, a last resort elsewhere."""
    if recipe.model.dtype == "bfloat16":
        return
    settings: dict[str, Any] = {"model.dtype": "bfloat16"}
    words = "model.dtype=bfloat16"
    if recipe.model.compute_dtype is not None:  # beside bfloat16 weights it is an error
        settings["model.compute_dtype"] = None
        words += " model.compute_dtype=null"
    zero = machines.sharding in FLAGS
    if now.training_gpus > 1 and not zero and machines.sharding is not Sharding.FSDP2:
        for sharding in (Sharding.ZERO2, Sharding.ZERO3):
            both = f"{FLAGS[sharding]} {words}"
            yield _Change(words=both, settings=settings, sharding=sharding)
    yield _Change(words=words, settings=settings, gentle=zero)


def _utilization(now: float) -> Iterator[_Change]:
    """Twentieths: downwards first, nearest first, then upwards."""
    at = round(now * 20)
    for twentieth in [*range(at - 1, 1, -1), *range(at + 1, 19)]:
        yield _set("rollout.gpu_memory_utilization", round(twentieth / 20, 2))


def _set(key: str, value: Any) -> _Change:
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return _Change(words=f"{key}={shown}", settings={key: value})


def _applied(
    recipe: Recipe, machines: Machines, changes: Sequence[_Change]
) -> tuple[Recipe, Machines]:
    for change in changes:
        if change.sharding is not None:
            machines = replace(machines, sharding=change.sharding)
        for key, value in change.settings.items():
            section, name = key.split(".")
            part = getattr(recipe, section)
            if section == "critic":
                part = replace(part, settings=replace(part.settings, **{name: value}))
            else:
                part = part.model_copy(update={name: value})
            recipe = recipe.model_copy(update={section: part})
    return recipe, machines


def _without(changes: tuple[_Change, ...], knob: str) -> tuple[_Change, ...]:
    return tuple(change for change in changes if change.knob != knob)
