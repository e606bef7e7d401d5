"""Composition root: a recipe becomes the live parts of a run. The only module that knows all the others."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmac.actor import Actor
from llmac.algorithms.base import Algorithm
from llmac.completions import CompletionLog
from llmac.config import Recipe, differences, dump, fingerprint, plain
from llmac.config.schema import DataConfig, RewardFunctionConfig
from llmac.config.traits import traits_of
from llmac.console import Console, show_log_records
from llmac.core.protocols import (
    AsksPromptValues,
    Critic,
    NeedsDemonstrations,
    NeedsPartner,
    NeedsRollouts,
    Player,
    PromptCritic,
    ReadsText,
    Resendable,
    SamplingParams,
    Stateful,
    WritesPrompts,
)
from llmac.core.stored import share_of
from llmac.core.types import Prompt
from llmac.critics.bench import CriticBench, PolicyOrder, TrainedPolicy
from llmac.data.demonstrations import demonstrations_in
from llmac.data.prompts import PromptStream, load_prompts
from llmac.engines.probe import (
    LOW_PRECISION_TOLERANCE,
    PROBE_TOKENS,
    TOLERANCE,
    check_engine_holds,
)
from llmac.errors import ConfigError, DataError
from llmac.loop import HeldOut, Parts, check_resume
from llmac.metrics import METRICS_FILE, MetricLog, read_metrics
from llmac.models.loading import (
    check_vocabulary,
    context_length,
    load_tokenizer,
    pad_token_id,
)
from llmac.new_actor import model_named, new_actor, order_of
from llmac.new_engine import Engines
from llmac.pretraining.file import rollouts_in
from llmac.rewards.contracts import RewardSpec
from llmac.rewards.loader import resolve
from llmac.rewards.reward_model import RewardModel
from llmac.rewards.scoring import Rewards
from llmac.runtime.checkpoint import CheckpointStore, RandomState, Remembered, Saveable
from llmac.runtime.context import Runtime
from llmac.runtime.phases import Phases
from llmac.schedule import PolicySchedule
from llmac.second_models import check_second_models, partner_model

logger = logging.getLogger(__name__)


def build(
    recipe: Recipe, runtime: Runtime, *, rows: Any = None, held_out_rows: Any = None
) -> Parts:
    """Everything a run needs, made in the order in which mistakes are cheapest to find.

    Folder, tokenizer, data and rewards come before any model is loaded.

    Args:
        recipe: validated configuration.
        runtime: the process group.
        rows: training rows in memory (a `datasets.Dataset` or a list of dicts) instead of `data.name`.
        held_out_rows: the same for `evaluation.data`.

    Raises:
        ConfigError, DataError, CheckpointError: before training, one clear message.
    """
    output = Path(recipe.run.output)
    share = _share(recipe, runtime)
    checkpoints = CheckpointStore(
        output / "checkpoints",
        keep_last=recipe.run.keep_last,
        runtime=runtime,
        fingerprint=fingerprint(recipe),
        is_in_use=_has_trained(output),
        explain=lambda: "".join(
            f"; {line}" for line in differences(recipe, output / "config.yaml")
        ),
    )
    check_resume(recipe.run, checkpoints)
    tokenizer = load_tokenizer(recipe.model)
    pad_id = pad_token_id(tokenizer)
    check_second_models(recipe)
    prompts = _prompts(recipe.data, recipe, tokenizer, rows, recipe.rollout.max_new_tokens)
    rewards = _rewards(recipe, runtime, tokenizer)
    algorithm: Algorithm = recipe.algorithm.settings
    plan = algorithm.plan(prompts_per_step=share, sampling=sampling_of(recipe))
    if isinstance(plan, NeedsDemonstrations):
        prompts = _demonstrated(plan, prompts, recipe, tokenizer)  # which are never scored
    else:
        rewards.check_columns(prompts[0].columns.keys())
    held_out = _held_out(recipe, runtime, tokenizer, held_out_rows, rewards)
    if runtime.is_main:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(dump(recipe))
    runtime.start_trackers(recipe.run.trackers, recipe.run.project, plain(recipe))

    if isinstance(plan, NeedsRollouts):
        _hand_over(plan, recipe, runtime)

    engines = Engines(recipe, runtime)
    try:
        longest = _longest(recipe, runtime, prompts, held_out)
        own_words = isinstance(plan, WritesPrompts) or traits_of(recipe.critic).writes_prompts
        player = engines.of_policy(tokenizer, longest=None if own_words else longest)
        _introduce(plan, player, engines, recipe)
        actor, critic = _learners(recipe, runtime, engines, player, rewards, pad_id)
    except BaseException:
        engines.close()  # nobody else knows of them yet, and they may be processes of their own
        raise
    console = Console(recipe.run.steps) if runtime.is_main else None
    if console is not None:
        show_log_records(console)
    stream = PromptStream(
        prompts,
        rank=runtime.rank,
        world_size=runtime.world_size,
        shuffle=recipe.data.shuffle,
        seed=recipe.run.seed,
    )
    roles: dict[str, Saveable] = {
        "policy": actor,
        "prompts": stream,
        "random": RandomState(runtime),
    }
    if isinstance(critic, Saveable):  # a critic that learns; the others have nothing to save
        roles["critic"] = critic
    if isinstance(plan, AsksPromptValues) and isinstance(critic, PromptCritic):
        plan.prompt_values = critic.prompt_values
        plan.reward_range = critic.reward_range
    memory, schedule = algorithm.memory(), _schedule(recipe)
    waits = schedule if schedule.warmup_explained is not None else None
    for role, remembering, alike in (
        ("plan", plan, False),
        ("algorithm", memory, True),
        ("schedule", waits, True),
    ):
        if isinstance(remembering, Stateful):
            roles[role] = Remembered(remembering, runtime, alike=alike)
    return Parts(
        algorithm=algorithm,
        memory=memory,
        schedule=schedule,
        actor=actor,
        critic=critic,
        engine=player.engine,
        engines=engines,
        plan=plan,
        prompts=stream,
        score=rewards,
        decode=player.decode,
        held_out=held_out,
        runtime=runtime,
        phases=Phases(runtime.rank, recipe.run.watchdog_seconds),
        log=MetricLog(output, runtime, console),
        completions=CompletionLog(
            output / "completions", every=recipe.run.log_completions_every, is_main=runtime.is_main
        ),
        checkpoints=checkpoints,
        roles=roles,
        probe_every=recipe.rollout.probe_every,
        probe_prompt=_probe_prompt(recipe, prompts),
        probe_tolerance=_probe_tolerance(recipe),
        output=output,
    )


def _share(recipe: Recipe, runtime: Runtime) -> int:
    prompts, ranks, parts = (
        recipe.actor.prompts_per_step,
        runtime.world_size,
        recipe.actor.minibatches,
    )
    if prompts % (ranks * parts):
        raise ConfigError(
            f"actor.prompts_per_step is {prompts}, which {ranks} processes x {parts} minibatches do not divide; "
            f"take a multiple of {ranks * parts}"
        )
    return prompts // ranks


def _hand_over(plan: NeedsRollouts, recipe: Recipe, runtime: Runtime) -> None:
    stored = rollouts_in(Path(plan.path), recipe).trajectories
    plan.seed = recipe.run.seed
    try:
        plan.stored = share_of(
            stored,
            rank=runtime.rank,
            world_size=runtime.world_size,
            keep_above=plan.keep_above,
        )
    except ValueError as error:
        raise DataError(str(error)) from error


def _demonstrated(
    plan: NeedsDemonstrations,
    prompts: list[Prompt],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Prompt]:
    """Hand over what to say to the prompts; those that are left of them."""
    shown = demonstrations_in(
        prompts,
        recipe.data,
        tokenizer,
        column=plan.column,
        append_end=plan.append_end,
        max_tokens=recipe.rollout.max_new_tokens,
    )
    plan.completions = shown.completions
    check_vocabulary(recipe.model, max(max(c.token_ids) for c in shown.completions.values()))
    logger.info("%s", shown.line())
    return shown.prompts


def _introduce(plan: object, player: Player, engines: Engines, recipe: Recipe) -> None:
    """Make those known to a plan that it speaks to."""
    if isinstance(plan, ReadsText):
        plan.decode = player.decode
    if isinstance(plan, WritesPrompts):
        plan.player = player
    if isinstance(plan, NeedsPartner):
        partner = partner_model(recipe)
        assert partner is not None, "the recipe's own card made the plan"
        plan.partner = engines.of_other(partner)


def _schedule(recipe: Recipe) -> PolicySchedule:
    run = recipe.run
    return PolicySchedule(
        warmup_steps=run.critic_warmup_steps,
        warmup_explained=run.critic_warmup_explained,
        every=run.policy_every,
    )


def sampling_of(recipe: Recipe) -> SamplingParams:
    """How a recipe samples in training."""
    rollout = recipe.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
    )


def _has_trained(output: Path) -> bool:
    """Whether a run has done a step there, also one that was killed before its first checkpoint."""
    record = output / METRICS_FILE
    return record.is_file() and any(line["step"] > 0 for line in read_metrics(record))


def _prompts(
    config: DataConfig,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    max_new_tokens: int,
) -> list[Prompt]:
    prompts, report = load_prompts(
        config,
        tokenizer,
        model_max_tokens=_context(recipe),
        max_new_tokens=max_new_tokens,
        rows=rows,
    )
    check_vocabulary(recipe.model, max(max(prompt.token_ids) for prompt in prompts))
    for line in report.lines():
        logger.info("%s", line)
    return prompts


def _context(recipe: Recipe) -> int | None:
    """Tokens of prompt and response together that policy and engine can take; None: no limit is known."""
    limits = (context_length(recipe.model), recipe.rollout.max_model_len)
    return min((limit for limit in limits if limit is not None), default=None)


def _probe_prompt(recipe: Recipe, prompts: list[Prompt]) -> tuple[int, ...]:
    """A short prompt, cut where it would leave no room for the probe's response."""
    shortest = min(prompts, key=lambda prompt: len(prompt.token_ids)).token_ids
    context = _context(recipe)
    return shortest if context is None else shortest[: max(1, context - PROBE_TOKENS)]


def _rewards(recipe: Recipe, runtime: Runtime, tokenizer: PreTrainedTokenizerBase) -> Rewards:
    def function_of(entry: RewardFunctionConfig) -> Callable[..., Any]:
        if entry.path is None:
            assert entry.model is not None, "the schema asks for one of the two"
            return RewardModel.from_pretrained(entry.model, device=runtime.device)
        return resolve(entry.path) if isinstance(entry.path, str) else entry.path

    specs = [
        RewardSpec(
            function=function_of(entry), name=entry.name, weight=entry.weight, adapter=entry.adapter
        )
        for entry in recipe.reward.functions
    ]
    return Rewards(
        specs,
        tokenizer,
        on_error=recipe.reward.on_error,
        zero_reward_warning_steps=recipe.reward.zero_warning_steps,
    )


def _held_out(
    recipe: Recipe,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    training_rewards: Rewards,
) -> HeldOut | None:
    wanted = recipe.evaluation
    if wanted is None:
        return None
    max_new_tokens = wanted.max_new_tokens or recipe.rollout.max_new_tokens
    prompts = _prompts(wanted.data, recipe, tokenizer, rows, max_new_tokens)
    rewards = training_rewards.for_evaluation()
    rewards.check_columns(prompts[0].columns.keys())
    return HeldOut(
        name="held_out",
        prompts=prompts[runtime.rank :: runtime.world_size],
        sampling=dataclasses.replace(
            sampling_of(recipe),
            n=wanted.samples,
            temperature=wanted.temperature,
            max_new_tokens=max_new_tokens,
        ),
        score=rewards,
        solved_at=wanted.solved_at,
        every=wanted.every,
        at_start=wanted.at_start,
    )


def _learners(
    recipe: Recipe,
    runtime: Runtime,
    engines: Engines,
    player: Player,
    rewards: Rewards,
    pad_id: int,
) -> tuple[Actor, Critic | None]:
    """Who learns, beside engines that sleep meanwhile."""
    actor, policy = new_actor(
        order_of(recipe), recipe, runtime, pad_id=pad_id, before_learning=engines.sleep
    )
    engine = player.engine
    if isinstance(engine, Resendable):
        engine.resend = actor.weights

    def new_policy(order: PolicyOrder) -> TrainedPolicy:
        pad = pad_token_id(load_tokenizer(order.model))
        return new_actor(order, recipe, runtime, pad_id=pad, before_learning=engines.sleep)[0]

    bench = CriticBench(
        runtime=runtime,
        model=recipe.model,
        policy=policy,
        policy_states=actor.hidden,
        prompt_states=partial(actor.hidden, beside_engine=True),
        engine=engine,
        player=player,
        new_player=lambda name, longest: engines.of_other(
            model_named(recipe.model, name), longest=longest
        ),
        new_policy=new_policy,
        model_named=partial(model_named, recipe.model),
        check_engine=partial(check_engine_holds, tolerance=_probe_tolerance(recipe)),
        score=rewards,
        sampling=sampling_of(recipe),
        decode=player.decode,
        values_ends=getattr(recipe.algorithm.settings, "on_truncation", None) != "terminal",
        seed=recipe.run.seed,
        pad_id=pad_id,
        packing=recipe.actor.packing,
        minibatches=recipe.actor.minibatches,
        max_tokens_per_microbatch=recipe.actor.max_tokens_per_microbatch,
        steps=recipe.run.steps,
        compute_dtype=torch.bfloat16 if recipe.model.compute_dtype else None,
        before_learning=engines.sleep,
    )
    return actor, recipe.critic.settings.build(bench) if recipe.critic else None


def _probe_tolerance(recipe: Recipe) -> float:
    """How far engine and trainer may be apart: rounding, in the lower precision of the two."""
    dtypes = {recipe.model.dtype, recipe.model.compute_dtype, recipe.rollout.dtype}
    return LOW_PRECISION_TOLERANCE if dtypes & {"bfloat16", "float16"} else TOLERANCE


def _longest(
    recipe: Recipe, runtime: Runtime, prompts: list[Prompt], held_out: HeldOut | None
) -> int:
    """Tokens of the longest prompt and response this run can ask an engine for, on any rank."""
    longest = max(len(p.token_ids) for p in prompts) + recipe.rollout.max_new_tokens
    if held_out is not None:
        asked = [len(p.token_ids) + held_out.sampling.max_new_tokens for p in held_out.prompts]
        longest = max(longest, *asked, 0)
    probe = len(_probe_prompt(recipe, prompts)) + PROBE_TOKENS
    return int(runtime.max(max(longest, probe)))
