"""What a generative critic learns to write from: analyses of unfinished responses that a teacher wrote, with a score.

The first of GenAC's three stages (arXiv:2604.10701): states of stored responses, as many that ended well as badly,
early, in the middle and late; the prompt that the critic itself will read; a teacher's words. The result is the data of
card `sft`.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmac.config import Recipe, verify
from llmac.core.collate import collate
from llmac.core.protocols import SamplingParams
from llmac.core.scores import parse_score, value_of_score
from llmac.core.types import Rollouts
from llmac.critics.generative import GenerativeConfig
from llmac.critics.generative_context import contexts
from llmac.critics.generative_prompt import CriticTemplate, critic_prompt, problem_text
from llmac.errors import ConfigError, DataError
from llmac.models.loading import ModelSpec, context_length, load_tokenizer
from llmac.new_actor import model_named
from llmac.new_engine import Engines
from llmac.outputs import make_room_for
from llmac.pretraining.file import rollouts_in
from llmac.pretraining.teachers import Question, ask_function, ask_model
from llmac.pretraining.trace_states import choose
from llmac.rewards.loader import resolve
from llmac.rollout_store import StoredRollouts
from llmac.runtime.context import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """How to make traces."""

    function: str | None = None
    """The teacher: `file.py:function`, called with the critic's prompt and a dictionary about the state (`id`,
    `problem`, `partial`, `outcome` from 0 to 1, `position` and `length` of the response in tokens, `columns` of its
    row); returns what the critic should write, or None."""
    model: str | None = None
    """The teacher: Hub id or folder of a language model, asked by the recipe's engine. One of the two."""
    chat: bool = False
    """Whether the model is asked through its chat template."""
    states: int = 1020
    """Asked about at most: a sixth for each of two outcomes and three thirds of the response. About 512 an outcome in
    the re-implementation of GenAC."""
    max_error: float | None = None
    """Traces are dropped whose score, scaled to 0 ... 1, is further than this from the outcome, squared; None: none.
    A bound below .25 drops all doubt: scores at .5 are right about coins."""
    seed: int = 0
    """Of the choice of states, and of what a model samples."""

    def __post_init__(self) -> None:
        """Refuse two teachers, or none, and what would leave nothing."""
        if (self.function is None) == (self.model is None):
            both = "both" if self.model is not None else "neither"
            raise ConfigError(
                "a teacher is either a function (--teacher-function file.py:function) or a model (--teacher), found "
                f"{both}"
            )
        if self.chat and self.model is None:
            raise ConfigError(
                "--chat has no effect on a function; remove it, or name a model with --teacher"
            )
        if self.states < 6:
            raise ConfigError(
                f"--states must be at least 6, one for each outcome and third of a response, found {self.states}"
            )
        if self.max_error is not None and not 0 < self.max_error <= 1:
            raise ConfigError(f"--max-error must be above 0 and at most 1, found {self.max_error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What became of the states."""

    path: Path
    asked: int
    kept: int
    silent: int
    """The teacher had nothing to say about them, or no room for their prompts."""
    unparsed: int
    """What it said has no score."""
    far_off: int
    """Its score was too far from the outcome."""
    cells: dict[str, int]
    """Kept for each outcome and third."""

    def line(self) -> str:
        """What a user should know, in one line."""
        cells = ", ".join(f"{name} {count}" for name, count in self.cells.items())
        return (
            f"{self.path}: {self.kept} traces of {self.asked} states ({cells}); left out: {self.silent} without words, "
            f"{self.unparsed} without a score, {self.far_off} with a score too far from the outcome"
        )


def critic_traces(recipe: Recipe, rollouts: Path, path: Path, how: Tracing) -> Traced:
    """Ask a teacher what a critic should write about states of stored responses, and keep it for `sft`.

    Each line of the new file has `prompt` (what the critic reads, as the recipe's critic section has it), `completion`
    (the teacher's words up to the score's closing tag), `score`, `outcome` (from 0 to 1) and `position` (fraction of
    the response before the state). States are where the recipe's algorithm asks. One process. In the place of the
    success rate of earlier steps stands the mean outcome of the file.

    Args:
        recipe: its critic is `generative`; nothing of its `run.output` is touched.
        rollouts: what `llmac rollouts` wrote.
        path: of the new .jsonl file.
        how: the teacher, how many states, what is kept.

    Raises:
        ConfigError: the critic writes no scores, the file exists, or there is no such teacher.
        DataError: the responses cannot be used, the teacher failed, or nothing is left.
    """
    verify(recipe)
    critic = recipe.critic.settings if recipe.critic else None
    if not isinstance(critic, GenerativeConfig):
        named = recipe.critic.name if recipe.critic else "none"
        raise ConfigError(
            f"critic-traces writes what critic generative learns from, and the recipe's critic is {named}; set critic: "
            "{name: generative}"
        )
    make_room_for(path, "--output")
    function = None if how.function is None else resolve(how.function)
    if function is not None and not callable(function):
        raise ConfigError(
            f"--teacher-function {how.function} is a {type(function).__name__}, no function"
        )
    stored = rollouts_in(rollouts, recipe)
    with contextlib.ExitStack() as cleanup:
        runtime = Runtime.create(seed=how.seed, output=None)
        cleanup.callback(runtime.close)
        if runtime.world_size > 1:
            raise ConfigError("llmac critic-traces is one process; start it without a launcher")
        asked = _questions(recipe, critic, stored, rollouts, how, runtime)
        if function is not None:
            words = ask_function(function, asked)
        else:
            engines = Engines(recipe, runtime)
            cleanup.callback(engines.close)
            assert how.model is not None, "checked with the settings"
            model = model_named(recipe.model, how.model)
            most = _most_prompt_tokens(recipe, critic, model)
            teacher = engines.of_other(model)
            params = SamplingParams(
                temperature=critic.temperature,
                max_new_tokens=critic.max_new_tokens,
                stop=(f"</{critic.tag}>",),
            )
            words = ask_model(
                teacher, asked, chat=how.chat, params=params, seed=how.seed, most_tokens=most
            )
    return _keep(asked, words, critic, path, how)


def _questions(
    recipe: Recipe,
    critic: GenerativeConfig,
    stored: StoredRollouts,
    file: Path,
    how: Tracing,
    runtime: Runtime,
) -> list[Question]:
    unscored = sum(t.reward is None for t in stored.trajectories)
    if unscored:
        raise DataError(
            f"{file}: {unscored} responses have no reward; store responses that were scored"
        )
    limit = int(stored.about.get("max_new_tokens", recipe.rollout.max_new_tokens))
    batch = collate(stored.trajectories, length_limit=limit)
    rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
    tokenizer = load_tokenizer(recipe.model)
    algorithm = recipe.algorithm.settings
    readable = {"decode": lambda ids: str(tokenizer.decode(list(ids)))}
    starts = algorithm.segments(rollouts, **(readable if algorithm.reads_text else {}))

    def read(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    context = contexts(critic, runtime, read)
    context.observe(rollouts)
    chosen = choose(rollouts, starts, critic.reward_range, count=how.states, seed=how.seed)
    if len({c.solved for c in chosen}) < 2:
        raise DataError(
            f"{file}: the states of all {len(stored.trajectories)} responses ended alike "
            f"({'well' if chosen and chosen[0].solved else 'badly'}), and a critic would learn to say that; store "
            "responses that differ, or look at critic.reward_range"
        )
    template = CriticTemplate(critic.template_file)
    questions: list[Question] = []
    for one in chosen:
        origin, position = one.state.origin, one.state.position
        problem, partial = problem_text(origin.prompt), read(origin.response_ids[:position])
        told = context.about(one.state, limit)
        written = critic_prompt(template, critic, problem=problem, partial=partial, told=told)
        questions.append(Question(prompt=written, problem=problem, partial=partial, chosen=one))
    logger.info("%d states of %d responses", len(questions), len(stored.trajectories))
    return questions


def _most_prompt_tokens(recipe: Recipe, critic: GenerativeConfig, teacher: ModelSpec) -> int | None:
    """What the teacher can read beside what it writes; None: no limit is known."""
    lengths = [n for n in (context_length(teacher), recipe.rollout.max_model_len) if n is not None]
    if not lengths:
        return None
    most = min(lengths) - critic.max_new_tokens
    if most < 1:
        raise ConfigError(
            f"critic.max_new_tokens is {critic.max_new_tokens}, and {teacher.name} has room for {min(lengths)} tokens "
            "of prompt and words together; lower critic.max_new_tokens, or raise rollout.max_model_len"
        )
    return most


def _keep(
    asked: Sequence[Question],
    words: Sequence[str | None],
    critic: GenerativeConfig,
    path: Path,
    how: Tracing,
) -> Traced:
    counts: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    lines: list[str] = []
    end = f"</{critic.tag}>"
    for question, said in zip(asked, words, strict=True):
        if said is None:
            counts["silent"] += 1
            continue
        # As the critic will be read: what it writes ends with the first closing tag.
        said = said[: said.index(end) + len(end)] if end in said else said
        score = parse_score(said, scale=critic.scale, tag=critic.tag)
        if score is None:
            counts["unparsed"] += 1
            continue
        outcome = question.chosen.outcome
        value = value_of_score(score, scale=critic.scale, reward_range=(0.0, 1.0))
        if how.max_error is not None and (value - outcome) ** 2 > how.max_error:
            counts["far_off"] += 1
            continue
        cells[question.chosen.cell] += 1
        row = {
            "prompt": question.prompt,
            "completion": said,
            "score": score,
            "outcome": outcome,
            "position": round(question.chosen.fraction, 4),
        }
        lines.append(json.dumps(row))
    if not lines:
        raise DataError(
            f"no trace is left of {len(asked)} states: {counts['silent']} without words, {counts['unparsed']} without "
            f"a score in <{critic.tag}> tags, {counts['far_off']} with one too far from the outcome (--max-error)"
        )
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return Traced(
        path=path,
        asked=len(asked),
        kept=len(lines),
        silent=counts["silent"],
        unparsed=counts["unparsed"],
        far_off=counts["far_off"],
        cells={name: cells[name] for name in sorted(cells)},
    )
