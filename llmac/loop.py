"""The training loop. One plain function; everything that varies between algorithms is in its parts.

A user who needs another loop copies `train`: the one place where copying is encouraged.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llmac.actor import Actor
from llmac.algorithms.base import Algorithm
from llmac.balance import balanced
from llmac.completions import CompletionLog
from llmac.core.collate import collate
from llmac.core.diagnostics import critic_health
from llmac.core.measures import Max, Mean, Metrics, Sum
from llmac.core.protocols import (
    CountsPrefixHits,
    Critic,
    Decode,
    Metered,
    NeedsDemonstrations,
    NeedsRollouts,
    Observer,
    OffersResponses,
    RolloutEngine,
    RolloutPlan,
    SamplingParams,
    Stateful,
)
from llmac.core.spans import span_values
from llmac.core.types import Prompt, Rollouts, Trajectory, Values
from llmac.data.prompts import PromptStream
from llmac.engines.probe import (
    LOW_PRECISION_TOLERANCE,
    TOLERANCE,
    check_engine_holds,
    prove_updates_arrive,
)
from llmac.errors import CheckpointError, ConsistencyError
from llmac.evaluate import evaluate
from llmac.metrics import MetricLog
from llmac.rewards.scoring import Rewards
from llmac.runtime.checkpoint import CheckpointStore, Saveable
from llmac.runtime.context import Runtime
from llmac.runtime.phases import Phases
from llmac.schedule import PolicySchedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One evaluation set: this rank's share of it, and how to sample."""

    name: str
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    score: Rewards
    solved_at: float
    every: int
    at_start: bool


class Run(Protocol):
    """What the loop reads of a recipe's `run` section."""

    @property
    def steps(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def resume(self) -> Literal["auto", "never", "must"]: ...


class Closable(Protocol):
    """Ends with the run."""

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything live that a run is made of. `build.build` makes one from a recipe."""

    algorithm: Algorithm
    memory: Stateful | None
    """What the algorithm remembers from step to step."""
    schedule: PolicySchedule
    actor: Actor
    critic: Critic | None
    engine: RolloutEngine
    """Has the policy."""
    engines: Closable
    """That one, and those of other models."""
    plan: RolloutPlan
    prompts: PromptStream
    score: Rewards
    decode: Decode
    held_out: HeldOut | None
    runtime: Runtime
    phases: Phases
    log: MetricLog
    completions: CompletionLog
    checkpoints: CheckpointStore
    roles: Mapping[str, Saveable]
    probe_every: int
    probe_prompt: tuple[int, ...]
    """Token ids that leave room for the probe's response."""
    probe_tolerance: float
    output: Path


def train(run: Run, parts: Parts) -> None:
    """Improve the policy for `run.steps` steps, continuing where the newest checkpoint stopped.

    Step k ends with the k-th update; step 0 is the untrained policy. Raises the errors of `llmac.errors`; every one
    leaves the last complete checkpoint and all metrics so far in place.
    """
    algorithm, actor, critic, engine = parts.algorithm, parts.actor, parts.critic, parts.engine
    log, phase, runtime, memory = parts.log, parts.phases, parts.runtime, parts.memory
    replays = isinstance(parts.plan, NeedsRollouts)
    # Nobody but an evaluation asks the engine anything.
    unheard = critic is None and (replays or isinstance(parts.plan, NeedsDemonstrations))
    observer = critic if isinstance(critic, Observer) else None
    moved = False

    with phase("start"):
        done = resume(parts)
        log.rewind(done + 1)
        parts.score.step = done
        prove_sync(parts)
        synchronize(parts, version=done, probe=True)
    if done == 0 and parts.held_out and parts.held_out.at_start:
        look_at_held_out(parts)
        log.add(parts.phases.drain())
        log.flush(0)
    if done >= run.steps:
        logger.warning(
            "all %d steps of this run are done; raise run.steps to train longer", run.steps
        )

    for step in range(done + 1, run.steps + 1):
        # 1. Act: sample responses with the current policy and reward the finished ones.
        prefix_hits(engine)  # those of probes and evaluations
        with phase("gen"):
            trajectories, counts = parts.plan.rollout(
                engine,
                parts.prompts,
                parts.score,
                seed=seed_of(run.seed, step, runtime.rank),
                sum_across=runtime.sum,
            )
            trajectories, evenness = balanced(trajectories, parts.plan, runtime)
        if not replays:
            check_versions(trajectories, engine.policy_version)

        # 2. Look: pad, then log-probs of the trained policy (and of the reference, if the algorithm asks).
        with phase("old_log_prob"):
            batch = collate(trajectories, length_limit=parts.plan.length_limit)
            rollouts = actor.annotate(batch, reference=algorithm.uses_reference)

        # 3. Value: V(s) exactly where the algorithm wants it. No critic, no values.
        with phase("values"):
            # What the plan says itself it knows better: it may have sampled more than these rows, or less.
            said = {**describe(rollouts), **counts}
            asked = critic if algorithm.uses_values else None
            readable = {"decode": parts.decode} if algorithm.reads_text else {}
            values = (
                asked.values(rollouts, algorithm.segments(rollouts, **readable)) if asked else None
            )
            if values and isinstance(asked, OffersResponses) and asked.offers:
                rollouts, values = with_offered(asked.responses(), rollouts, values, parts)
            if isinstance(asked, Metered):
                log.add(asked.metrics())
            log.add(prefix_hits(engine))

        # 4. Credit: who deserves what. With the loss, this *is* the algorithm; pure, but for a memory it may keep.
        with phase("adv"):
            remembered = {} if memory is None else {"memory": memory}
            credit = algorithm.credit(rollouts, values, sum_across=runtime.sum, **remembered)
            if values and credit.critic_targets:
                outcomes = rollouts.rewards.sum(1)
                log.add(
                    critic_health(values, credit.critic_targets, outcomes, sum_across=runtime.sum)
                )

        # 5. Learn: the policy along its advantages, the critic towards its targets. In this order: a critic that
        #    shares the policy's trunk moves the policy, and the first ratio of the step must be 1.
        moves = parts.schedule.moves(step, credit.metrics)
        if moves:
            with phase("update_actor"):
                log.add(actor.update(rollouts, credit, algorithm))
        if critic and credit.critic_targets:
            with phase("update_critic"):
                log.add(critic.update(rollouts, credit.critic_targets))
        if observer is not None:
            with phase("update_critic"):
                log.add(observer.observe(rollouts))

        # 6. Sync: the next step samples the new policy.
        looks = bool(parts.held_out) and (step % parts.held_out.every == 0 or step == run.steps)
        if looks or not unheard:
            with phase("sync"):
                due = step % parts.probe_every == 0
                synchronize(parts, version=step, probe=(moves and not moved) or due)
            moved = moved or moves

        log.add({**parts.score.metrics(), **said}, evenness, credit.metrics)
        if isinstance(engine, Metered):
            log.add(engine.metrics())
        parts.completions.log(step, rollouts, credit)
        if looks:
            look_at_held_out(parts)
        log.add(phase.drain())
        with phase("log"):
            log.flush(step)
        # After the metrics: a kill in between repeats a step, and no line of metrics.jsonl is ever missing.
        if step % run.save_every == 0 or step == run.steps:
            with phase("save"):
                parts.checkpoints.save(step, parts.roles)


def check_resume(run: Run, checkpoints: CheckpointStore) -> None:
    """Refuse to continue, or to start over, where the recipe does not want that; nothing is written.

    Raises:
        CheckpointError: `run.resume` is `never` and there is a checkpoint, or `must` and there is none.
    """
    latest = checkpoints.latest()
    if run.resume == "never" and latest is not None:
        raise CheckpointError(
            f"run.resume is never, and {latest} exists; choose another run.output, or run.resume: auto to continue"
        )
    if run.resume == "must" and latest is None:
        raise CheckpointError(
            "run.resume is must, and there is no complete checkpoint in run.output; check its name, or set "
            "run.resume: auto to start from the beginning"
        )


def resume(parts: Parts) -> int:
    """Restore the newest checkpoint; returns the steps done, 0 on a fresh run."""
    latest = parts.checkpoints.latest()
    done = parts.checkpoints.restore_latest(parts.roles)
    if done and parts.prompts.epoch == 0 and not isinstance(parts.plan, NeedsRollouts):
        raise ConsistencyError(
            f"step {done} was restored, but the prompts are at their beginning: the run would see them again"
        )
    if latest is not None:
        logger.info("continuing after step %d from %s", done, latest)
    return done


def synchronize(parts: Parts, *, version: int, probe: bool) -> None:
    """Give the engine the policy's weights, check that it says it has them, and now and then prove it."""
    parts.engine.load_weights(parts.actor.weights(), version)
    if parts.engine.policy_version != version:
        raise ConsistencyError(
            f"the engine reports weights of version {parts.engine.policy_version} after it was given version {version}"
        )
    if probe:
        check_engine_holds(
            parts.engine,
            parts.actor.logprobs_of,
            [parts.probe_prompt],
            tolerance=parts.probe_tolerance,
            when=f"after the sync of version {version}",
        )


def prove_sync(parts: Parts) -> None:
    """Before the first step, prove that changed weights reach the engine, and leave the true ones there.

    In float32 a single tensor that stays behind shows. In low precision rounding hides most single tensors, and the
    proof is only that updates arrive at all; the version and the periodic probe are what is left.
    """
    low_precision = parts.probe_tolerance > TOLERANCE
    prove_updates_arrive(
        parts.engine,
        parts.actor.weights,
        parts.actor,
        [parts.probe_prompt],
        # Noise in every layer also makes the rounding of low precision larger.
        tolerance=5 * LOW_PRECISION_TOLERANCE if low_precision else parts.probe_tolerance,
    )


def look_at_held_out(parts: Parts) -> None:
    """Evaluate on the held-out set and log what it says."""
    held_out = parts.held_out
    assert held_out is not None
    with parts.phases("eval"):
        parts.log.add(
            evaluate(
                parts.engine,
                held_out.prompts,
                held_out.score,
                sampling=held_out.sampling,
                name=held_out.name,
                solved_at=held_out.solved_at,
                sum_across=parts.runtime.sum,
            )
        )
    held_out.score.step = parts.score.step
    for name, measure in held_out.score.metrics().items():
        # Means are in `evaluate` already; what went wrong is known only here.
        if name == "reward/unscored" or name.endswith("/errors"):
            parts.log.add({f"eval/{held_out.name}/{name}": measure})


def prefix_hits(engine: RolloutEngine) -> Metrics:
    """How much of its prompts an engine that knows did not have to compute, since the last call."""
    return engine.prefix_hits() if isinstance(engine, CountsPrefixHits) else {}


def check_versions(trajectories: Sequence[Trajectory], version: int) -> None:
    """Responses must come from the weights of the last sync, but for those that are replayed."""
    stale = [t for t in trajectories if t.policy_version != version and not t.age]
    if stale:
        raise ConsistencyError(
            f"{len(stale)} responses, the first to prompt {stale[0].prompt.id}, were sampled by weights of version "
            f"{stale[0].policy_version}, not {version}: the engine was not updated"
        )


def with_offered(
    offered: Sequence[Trajectory], rollouts: Rollouts, values: Values, parts: Parts
) -> tuple[Rollouts, Values]:
    """The step's rows and values with the responses behind them that a critic sampled on the way. Collective."""
    # A rank without any looks at a row of its own, for the sake of the others, and drops it.
    trajectories = offered or rollouts.trajectories[:1]
    batch = collate(trajectories, length_limit=rollouts.length_limit)
    more = parts.actor.annotate(batch, reference=parts.algorithm.uses_reference)
    if not offered:
        return rollouts, values
    return rollouts.joined(more), values.joined(span_values(more))


def describe(rollouts: Rollouts) -> Metrics:
    """What is always worth knowing of a step's rows: lengths of those that ended, tokens that are theirs to train on.

    Those are what was sampled, unless the plan says otherwise.
    """
    tokens = Sum((rollouts.action_mask & rollouts.fresh).sum())
    counted: Metrics = {"rollout/tokens": tokens, "rollout/sampled_tokens": tokens}
    ended = ~rollouts.paused
    if not ended.any():
        return counted
    lengths, count = rollouts.action_mask.sum(1)[ended], float(ended.sum())
    return {
        "response_length/mean": Mean(lengths.sum(), count),
        "response_length/max": Max(float(lengths.max())),
        "response_length/clip_ratio": Mean(rollouts.truncated[ended].sum(), count),
        **counted,
    }


def seed_of(*numbers: int) -> int:
    """A 63-bit seed that depends on all the numbers and on nothing else.

    >>> seed_of(0, 1, 0) == seed_of(0, 1, 0), seed_of(0, 1, 0) == seed_of(1, 0, 0)
    (True, False)
    """
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
