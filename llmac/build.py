"""Composition root: a recipe becomes the live parts of a run. The only module that knows all the others."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llmac.actor import Actor, Reference
from llmac.algorithms.base import Algorithm
from llmac.completions import CompletionLog
from llmac.config import Recipe, differences, dump, fingerprint, plain
from llmac.config.schema import DataConfig, RewardFunctionConfig
from llmac.console import Console, show_log_records
from llmac.core.protocols import (
    AsksPromptValues,
    Critic,
    Decode,
    NeedsRollouts,
    PromptCritic,
    ReadsText,
    Resendable,
    RolloutEngine,
    SamplingParams,
    Stateful,
)
from llmac.core.stored import share_of
from llmac.core.types import Prompt
from llmac.critics.bench import CriticBench
from llmac.data.prompts import PromptStream, load_prompts
from llmac.engines.probe import LOW_PRECISION_TOLERANCE, PROBE_TOKENS, TOLERANCE
from llmac.errors import ConfigError, DataError
from llmac.loop import HeldOut, Parts, check_resume
from llmac.metrics import METRICS_FILE, MetricLog, read_metrics
from llmac.models.loading import (
    LanguageModel,
    add_lora,
    check_vocabulary,
    context_length,
    load_causal_lm,
    load_tokenizer,
    pad_token_id,
    torch_dtype,
    train_in_full_mode,
)
from llmac.models.packing import Packing
from llmac.models.policy import TokenPolicy
from llmac.pretraining.file import rollouts_in
from llmac.rewards.contracts import RewardSpec
from llmac.rewards.loader import resolve
from llmac.rewards.reward_model import RewardModel
from llmac.rewards.scoring import Rewards
from llmac.runtime.checkpoint import CheckpointStore, RandomState, Remembered, Saveable
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization
from llmac.runtime.phases import Phases
from llmac.schedule import PolicySchedule

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
    prompts = _prompts(recipe.data, recipe, tokenizer, rows, recipe.rollout.max_new_tokens)
    rewards = _rewards(recipe, runtime, tokenizer)
    rewards.check_columns(prompts[0].columns.keys())
    held_out = _held_out(recipe, runtime, tokenizer, held_out_rows, rewards)
    if runtime.is_main:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(dump(recipe))
    runtime.start_trackers(recipe.run.trackers, recipe.run.project, plain(recipe))

    algorithm: Algorithm = recipe.algorithm.settings
    plan = algorithm.plan(prompts_per_step=share, sampling=sampling_of(recipe))
    if isinstance(plan, NeedsRollouts):
        _hand_over(plan, recipe, runtime)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    if isinstance(plan, ReadsText):
        plan.decode = decode
    engine = _engine(
        recipe, tokenizer, runtime, longest=_longest(recipe, runtime, prompts, held_out)
    )
    try:
        actor, critic = _learners(recipe, algorithm, runtime, engine, rewards, pad_id, decode)
    except BaseException:
        engine.close()  # nobody else knows of it yet, and it may be processes of its own
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
        engine=engine,
        plan=plan,
        prompts=stream,
        score=rewards,
        decode=decode,
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
        plan.stored = share_of(stored, rank=runtime.rank, world_size=runtime.world_size)
    except ValueError as error:
        raise DataError(str(error)) from error


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
    algorithm: Algorithm,
    runtime: Runtime,
    engine: RolloutEngine,
    rewards: Rewards,
    pad_id: int,
    decode: Decode,
) -> tuple[Actor, Critic | None]:
    """Who learns, beside an engine that sleeps meanwhile."""
    compute_dtype = torch.bfloat16 if recipe.model.compute_dtype else None
    actor, policy = _actor(recipe, algorithm, runtime, pad_id, engine.sleep, compute_dtype)
    if isinstance(engine, Resendable):
        engine.resend = actor.weights
    bench = CriticBench(
        runtime=runtime,
        model=recipe.model,
        policy=policy,
        policy_states=actor.hidden,
        prompt_states=partial(actor.hidden, beside_engine=True),
        engine=engine,
        score=rewards,
        sampling=sampling_of(recipe),
        decode=decode,
        seed=recipe.run.seed,
        pad_id=pad_id,
        packing=recipe.actor.packing,
        minibatches=recipe.actor.minibatches,
        max_tokens_per_microbatch=recipe.actor.max_tokens_per_microbatch,
        steps=recipe.run.steps,
        compute_dtype=compute_dtype,
        before_learning=engine.sleep,
    )
    return actor, recipe.critic.settings.build(bench) if recipe.critic else None


def _actor(
    recipe: Recipe,
    algorithm: Algorithm,
    runtime: Runtime,
    pad_id: int,
    before_learning: Callable[[], None],
    compute_dtype: torch.dtype | None,
) -> tuple[Actor, TokenPolicy]:
    spec, settings = recipe.model, recipe.actor

    def as_policy(model: LanguageModel) -> TokenPolicy:
        return TokenPolicy(
            model, temperature=recipe.rollout.temperature, chunk_mb=spec.logprob_chunk_mb
        )

    with runtime.loading(torch_dtype(spec)):
        base = load_causal_lm(spec)
    model = base if spec.lora is None else add_lora(base, spec.lora)
    train_in_full_mode(model, gradient_checkpointing=spec.gradient_checkpointing)
    policy = as_policy(model)
    packing = Packing(
        kind=settings.packing, max_tokens=settings.max_tokens_per_microbatch, pad_id=pad_id
    )
    frozen: LanguageModel | None = None
    reference: Reference | None = None
    if algorithm.uses_reference and isinstance(model, PeftModel) and spec.reference is None:
        reference = Reference(None, model.disable_adapter)
    elif algorithm.uses_reference:
        with runtime.loading(torch_dtype(spec)):
            frozen = load_causal_lm(spec, spec.reference)
    readers = [model] if frozen is None else [model, frozen]
    packing = packing.fitting(*readers, device=runtime.device)  # before they are in shards
    if frozen is not None:
        reference = Reference(runtime.freeze(as_policy(frozen), compute_dtype=compute_dtype))
    learning_steps = (recipe.run.steps - recipe.run.critic_warmup_steps) // recipe.run.policy_every
    if learning_steps <= 0:
        logger.warning(
            "run.critic_warmup_steps is %d and run.steps is %d: the policy does not learn in this run",
            recipe.run.critic_warmup_steps,
            recipe.run.steps,
        )
    learner = Learner(
        policy,
        Optimization.of(settings),
        runtime,
        name="actor",
        total_steps=learning_steps * settings.epochs * settings.minibatches,
        compute_dtype=compute_dtype,
        before_learning=before_learning,
    )
    actor = Actor(
        policy,
        learner,
        runtime,
        reference=reference,
        packing=packing,
        epochs=settings.epochs,
        minibatches=settings.minibatches,
        ratio_tolerance=recipe.run.ratio_tolerance,
        sync_bucket_bytes=recipe.rollout.sync_bucket_mb << 20,
        engine_dtype=_engine_dtype(recipe),
    )
    return actor, policy


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


def _engine_dtype(recipe: Recipe) -> torch.dtype:
    """What the engine computes in: the trainer's precision, unless the recipe wants vLLM in another."""
    spec, rollout = recipe.model, recipe.rollout
    trainer = spec.compute_dtype or spec.dtype
    name = trainer if rollout.engine == "hf" or rollout.dtype == "auto" else rollout.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _engine(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, runtime: Runtime, *, longest: int
) -> RolloutEngine:
    spec, rollout = recipe.model, recipe.rollout
    if rollout.engine == "hf":
        from llmac.engines.hf_engine import HFEngine

        # In the precision the trainer computes in: the sampler should be the policy, not a better-rounded one.
        model = load_causal_lm(spec, dtype=_engine_dtype(recipe))
        torch.nn.Module.to(model, runtime.device)
        return HFEngine(model, tokenizer, max_batch_rows=rollout.max_num_seqs)
    shared: dict[str, Any] = {  # keyword arguments of both, whose types vary
        "max_num_seqs": rollout.max_num_seqs,
        "trust_remote_code": spec.trust_remote_code,
        "revision": spec.revision,
    }
    if rollout.engine == "vllm_server":
        from llmac.engines.vllm_server import VLLMServerEngine
        from llmac.serve import local_servers, sender_of

        trainers = runtime.local_world_size
        return VLLMServerEngine(
            spec.name,
            tokenizer,
            runtime,
            sender=lambda: sender_of(recipe),
            servers=rollout.servers,
            launch=lambda: local_servers(
                recipe, Path(recipe.run.output), first_gpu=trainers, longest=longest
            ),
            request_timeout_seconds=rollout.request_timeout_seconds,
            **shared,
        )
    from llmac.engines.vllm_engine import VLLMEngine

    return VLLMEngine(
        spec.name,
        tokenizer,
        dtype=str(_engine_dtype(recipe)).removeprefix("torch."),
        # Room for what can come, not for the whole context of the architecture.
        max_model_len=rollout.max_model_len or longest,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_mb=rollout.kv_cache_mb,
        enforce_eager=rollout.enforce_eager,
        tensor_parallel_size=rollout.tensor_parallel_size,
        sleep_level=rollout.sleep_level,
        **shared,
    )
