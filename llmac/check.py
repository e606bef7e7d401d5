"""What can be found out about a recipe without loading a model: `llmac check`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmac.config.schema import DataConfig, Recipe
from llmac.config.surroundings import (
    check_cards,
    check_data_paths,
    check_models,
    check_output,
    check_rewards,
    is_local,
)
from llmac.config.traits import partner_of, traits_of
from llmac.errors import LlmacError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at, or one that could not be."""

    subject: str
    verdict: Literal["ok", "wrong", "not checked"]
    detail: str


class _Unseen(Exception):
    """Nothing is wrong, but this cannot be looked at here; the message says why."""


def check(recipe: Recipe) -> Iterator[Finding]:
    """Findings in the order a run would meet them. Nothing is downloaded and no model is loaded."""
    tokenizer: list[PreTrainedTokenizerBase] = []
    yield _look("output folder", lambda: check_output(recipe))
    yield _look("cards", lambda: check_cards(recipe))
    rewards = _look("reward functions", lambda: check_rewards(recipe))
    yield rewards
    folders = _look("models", lambda: check_models(recipe))
    yield folders
    if folders.verdict == "ok":
        yield _look("tokenizer", lambda: _load_tokenizer(recipe, tokenizer))
        if partner_of(recipe) is not None or traits_of(recipe.critic).engine is not None:
            yield _look("second models", lambda: _second_models(recipe))
    files = _look("data", lambda: check_data_paths(recipe))
    if files.verdict == "wrong":
        yield files
    else:
        yield _look(
            "data", lambda: _data(recipe, recipe.data, recipe.rollout.max_new_tokens, tokenizer)
        )
        if recipe.evaluation is not None:
            held_out = recipe.evaluation
            limit = held_out.max_new_tokens or recipe.rollout.max_new_tokens
            yield _look("evaluation data", lambda: _data(recipe, held_out.data, limit, tokenizer))
    yield Finding(
        subject="model weights and memory",
        verdict="not checked",
        detail="`llmac plan` estimates memory; for certainty, run one step with run.steps=1",
    )


def _look(subject: str, inspect: Callable[[], str]) -> Finding:
    try:
        return Finding(subject=subject, verdict="ok", detail=inspect())
    except _Unseen as reason:
        return Finding(subject=subject, verdict="not checked", detail=str(reason))
    except LlmacError as error:
        return Finding(subject=subject, verdict="wrong", detail=str(error))


def _load_tokenizer(recipe: Recipe, keep: list[Any]) -> str:
    name = recipe.model.tokenizer or recipe.model.name
    if not Path(name).expanduser().is_dir():
        raise _Unseen(f"{name} is on the Hub and would have to be downloaded")
    from llmac.models.loading import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    keep.append(tokenizer)
    chat = "with" if tokenizer.chat_template else "without"
    return f"{name}: {len(tokenizer)} tokens, {chat} a chat template"


def _second_models(recipe: Recipe) -> str:
    from llmac.second_models import check_second_models, critic_model, partner_model

    for model in (recipe.model, critic_model(recipe), partner_model(recipe)):
        for name in () if model is None else (model.name, model.tokenizer or model.name):
            if not Path(name).expanduser().is_dir():
                raise _Unseen(f"{name} is on the Hub and would have to be downloaded")
    return check_second_models(recipe)


def _data(
    recipe: Recipe,
    data: DataConfig,
    max_new_tokens: int,
    tokenizers: list["PreTrainedTokenizerBase"],
) -> str:
    if not is_local(data):
        raise _Unseen(f"{data.name} is on the Hub and would have to be downloaded")
    from llmac.core.protocols import NeedsDemonstrations
    from llmac.data.demonstrations import demonstrations_in
    from llmac.data.prompts import load_prompts
    from llmac.data.tables import read_table

    if not tokenizers:
        rows = read_table(data.name, subset=data.subset, split=data.split)
        columns = ", ".join(rows[0]) if rows else "none"
        raise _Unseen(
            f"{data.name} has {len(rows)} rows with the columns {columns}; "
            "prompts and their lengths need the tokenizer"
        )
    prompts, report = load_prompts(
        data,
        tokenizers[0],
        model_max_tokens=_context_length(recipe),
        max_new_tokens=max_new_tokens,
    )
    lines = report.lines()
    plan = _plan(recipe)
    if data is recipe.data and isinstance(plan, NeedsDemonstrations):  # which are not scored
        shown = demonstrations_in(
            prompts,
            data,
            tokenizers[0],
            column=plan.column,
            append_end=plan.append_end,
            max_tokens=max_new_tokens,
        )
        lines.append(shown.line())
    else:
        _check_columns(recipe, set(prompts[0].columns))
    start = str(tokenizers[0].decode(list(prompts[0].token_ids)))
    first = start if len(start) <= 200 else start[:200] + "..."
    return "\n".join([*lines, f"columns: {', '.join(report.columns)}", f"first prompt: {first!r}"])


def _plan(recipe: Recipe) -> object:
    from llmac.core.protocols import SamplingParams

    sampling = SamplingParams(max_new_tokens=recipe.rollout.max_new_tokens)
    return recipe.algorithm.settings.plan(prompts_per_step=1, sampling=sampling)


def _check_columns(recipe: Recipe, columns: set[str]) -> None:
    """Every reward function finds the columns it requires."""
    from llmac.rewards.contracts import RewardSpec, understand
    from llmac.rewards.loader import resolve

    for entry in recipe.reward.functions:
        if entry.path is not None:
            function = resolve(entry.path) if isinstance(entry.path, str) else entry.path
            spec = RewardSpec(
                function=function, name=entry.name, weight=entry.weight, adapter=entry.adapter
            )
            understand(spec).check_columns(columns)


def _context_length(recipe: Recipe) -> int | None:
    """Tokens of prompt and response together, as far as is known on this machine."""
    if not (Path(recipe.model.name).expanduser() / "config.json").exists():
        return recipe.rollout.max_model_len
    from llmac.models.loading import context_length

    limits = (context_length(recipe.model), recipe.rollout.max_model_len)
    return min((limit for limit in limits if limit is not None), default=None)
