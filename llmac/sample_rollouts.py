"""Samples responses with a recipe's policy, has them judged, and keeps them in a file for a critic to learn from."""

import contextlib
import dataclasses
import logging
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmac.build import build, sampling_of
from llmac.config import Recipe, verify
from llmac.config.cards import choose_algorithm
from llmac.core.critique import Critique
from llmac.core.plans import Flat
from llmac.core.protocols import NeedsPartner
from llmac.core.types import Finish, Trajectory
from llmac.data.prompts import PromptStream
from llmac.errors import ConfigError
from llmac.loop import Parts, seed_of, synchronize
from llmac.models.loading import load_tokenizer
from llmac.outputs import make_room_for
from llmac.rollout_store import check_storable, vocabulary_mark, write_rollouts
from llmac.runtime.context import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What `sample_rollouts` did."""

    path: Path
    responses: int
    prompts: int
    """Different ones."""
    mean_reward: float
    truncated: float
    """Fraction of responses cut at the length limit."""
    tokens: int
    """Sampled in all."""
    seconds: float
    """Of sampling and judging, without loading."""

    def line(self) -> str:
        """What a user should know, in one line."""
        return (
            f"{self.path}: {self.responses} responses to {self.prompts} prompts, mean reward {self.mean_reward:.4g}, "
            f"{self.truncated:.1%} cut at the length limit, {self.tokens} tokens in {self.seconds:.1f} seconds"
        )


def sample_rollouts(recipe: Recipe, path: Path, *, responses: int, rows: Any = None) -> Sampled:
    """Answer prompts of the recipe's data with its policy, engine, sampling parameters and reward functions.

    Every prompt gets `algorithm.group_size` responses and none is dropped, whatever plan the algorithm has: leaving
    out groups whose rewards are equal would shift the values that a critic learns from the rest. Only a plan of two
    models is kept: its rows, critiques or answers that follow them, are no plain responses. One process.

    Args:
        recipe: nothing of its `run.output` is touched.
        path: of the new file.
        responses: at least so many; rounded up to whole groups.
        rows: prompts in memory instead of `data.name`.

    Raises:
        ConfigError: the file exists, or nothing is asked for.
        DataError: the prompts cannot be stored.
    """
    verify(recipe)
    if responses < 1:
        raise ConfigError(f"--responses must be at least 1, found {responses}")
    make_room_for(path, "--output")
    with contextlib.ExitStack() as cleanup:
        aside = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="llmac-rollouts-"))
        runtime = Runtime.create(seed=recipe.run.seed, output=None)
        cleanup.callback(runtime.close)
        if runtime.world_size > 1:
            raise ConfigError("llmac rollouts is one process; start it without a launcher")
        parts = build(_without_learning(recipe, aside), runtime, rows=rows)
        for close in (parts.phases.close, parts.score.close, parts.log.close, parts.engines.close):
            cleanup.callback(close)
        return _sample(recipe, parts, path, responses)


def _without_learning(recipe: Recipe, output: str) -> Recipe:
    """The same recipe as far as sampling goes, with an output folder to be thrown away."""
    card = recipe.algorithm
    plan = card.settings.plan(prompts_per_step=1, sampling=sampling_of(recipe))
    if not isinstance(plan, NeedsPartner):
        # The plainest card: independent responses, no critic and no reference policy to load.
        group_size = card.settings.group_size
        card = choose_algorithm({"name": "reinforce_pp", "group_size": group_size})
    run = recipe.run.model_copy(update={"output": output, "resume": "auto", "trackers": ()})
    changes = {"algorithm": card, "critic": None, "evaluation": None, "run": run}
    return recipe.model_copy(update=changes)


def _sample(recipe: Recipe, parts: Parts, path: Path, responses: int) -> Sampled:
    plan = parts.plan
    assert isinstance(plan, (Flat, Critique))
    groups = math.ceil(responses / recipe.algorithm.settings.group_size)
    prompts = parts.prompts.take(groups)
    check_storable(prompts)
    synchronize(parts, version=0, probe=True)
    in_order = PromptStream(prompts, shuffle=False)
    trajectories: list[Trajectory] = []
    since = time.monotonic()
    for start in range(0, groups, recipe.actor.prompts_per_step):
        due = min(recipe.actor.prompts_per_step, groups - start)
        round_ = dataclasses.replace(plan, prompts_per_step=due)
        seed = seed_of(recipe.run.seed, start)
        found, _ = round_.rollout(parts.engine, in_order, parts.score, seed=seed)
        trajectories += [dataclasses.replace(t, group=start + t.group) for t in found]
        logger.info("%d of %d responses", len(trajectories), responses)
    seconds = time.monotonic() - since
    write_rollouts(path, trajectories, _about(recipe))
    count = len(trajectories)
    return Sampled(
        path=path,
        responses=count,
        prompts=len({t.prompt.token_ids for t in trajectories}),
        mean_reward=math.fsum(t.reward or 0.0 for t in trajectories) / count,
        truncated=sum(t.finish is not Finish.STOP for t in trajectories) / count,
        tokens=sum(sum(t.action_mask) for t in trajectories),
        seconds=seconds,
    )


def _about(recipe: Recipe) -> dict[str, Any]:
    rollout = recipe.rollout
    return {
        "model": recipe.model.name,
        "data": recipe.data.name,
        "rewards": [f.name or str(f.path or f.model) for f in recipe.reward.functions],
        "vocabulary": vocabulary_mark(load_tokenizer(recipe.model).get_vocab()),
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_new_tokens": rollout.max_new_tokens,
        "seed": recipe.run.seed,
    }
