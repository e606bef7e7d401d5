"""Sampled and judged responses in a file: what a critic is trained on before, or without, a run.

One Parquet file, one row a response. Token ids are what counts; the text beside them is for people, who can open the
file with pandas or `datasets`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from llmac.core.types import Finish, Prompt, Trajectory
from llmac.errors import DataError, did_you_mean

KEY = b"llmac.rollouts"
"""Where the description stands in the metadata of the file; also what tells our files from others."""
FORMAT = 1
"""Raised when old readers would misread new files."""

_IDS = pyarrow.list_(pyarrow.int32())
_SCHEMA: Mapping[str, pyarrow.DataType] = {
    "prompt_id": pyarrow.string(),
    "prompt_token_ids": _IDS,
    "source": pyarrow.string(),  # JSON: a string, or chat messages
    "columns": pyarrow.string(),  # JSON
    "response": pyarrow.string(),
    "response_ids": _IDS,
    "action_mask": pyarrow.list_(pyarrow.bool_()),
    "sampler_logprobs": pyarrow.list_(pyarrow.float64()),
    "finish": pyarrow.string(),
    "group": pyarrow.int64(),
    "reward": pyarrow.float64(),
    "reward_parts": pyarrow.string(),  # JSON
    "policy_version": pyarrow.int64(),
    "fresh_from": pyarrow.int64(),
    "value_span": pyarrow.list_(pyarrow.float64()),
    "sibling_std": pyarrow.float64(),
    "baseline_reward": pyarrow.float64(),
    "age": pyarrow.int64(),
    "monte_carlo": pyarrow.list_(pyarrow.float64()),
}

_LATER: Mapping[str, Any] = {"sibling_std": None, "baseline_reward": None, "age": 0}
"""Columns that older files lack, and what their responses have there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRollouts:
    """Everything a rollout file says."""

    trajectories: tuple[Trajectory, ...]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How they came about: model, sampling, vocabulary; JSON."""
    monte_carlo: tuple[tuple[float | None, ...] | None, ...] = ()
    """For each response, estimates of V(s_t) by sampled continuations, in reward units, one a token; None where nobody
    has asked. Empty: none for any response."""


def write_rollouts(
    path: Path | str,
    trajectories: Sequence[Trajectory],
    about: Mapping[str, Any] | None = None,
    *,
    monte_carlo: Sequence[Sequence[float | None] | None] = (),
) -> None:
    """Write responses to one Parquet file; an older file of that name is replaced, and only by a complete one.

    Args:
        path: of the file; folders above are made if need be.
        trajectories: at least one; what `read_rollouts` gives back is equal.
        about: how they came about, for whoever opens the file; JSON.
        monte_carlo: see `StoredRollouts`; in the order of `trajectories`, or empty.

    Raises:
        DataError: there is nothing to write, or it does not fit into such a file.

    >>> from tempfile import mkdtemp
    >>> prompt = Prompt(id="p0", token_ids=(1,), source="?")
    >>> said = Trajectory(prompt=prompt, response_ids=(5, 6), action_mask=(True, True),
    ...                   sampler_logprobs=(-.5, -.25), finish=Finish.STOP, group=0, reward=1.0)
    >>> file = Path(mkdtemp()) / "rollouts.parquet"
    >>> write_rollouts(file, [said])
    >>> read_rollouts(file) == [said]
    True
    """
    path = Path(path)
    if not trajectories:
        raise DataError(f"{path}: there are no rollouts to write; a file has at least one")
    _check_monte_carlo(trajectories, monte_carlo)
    check_storable(t.prompt for t in trajectories)
    rows = [
        _row(t, values)
        for t, values in zip(trajectories, monte_carlo or [None] * len(trajectories), strict=True)
    ]
    description = json.dumps({"format": FORMAT, "about": dict(about or {})})
    schema = pyarrow.schema(list(_SCHEMA.items()), metadata={KEY: description.encode()})
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            pyarrow.parquet.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_rollouts(path: Path | str) -> list[Trajectory]:
    """The responses of a file that `write_rollouts` wrote, in its order.

    Raises:
        DataError: there is no such file, it is not one of ours, or it is empty.
    """
    return list(read_store(path).trajectories)


def read_store(path: Path | str) -> StoredRollouts:
    """The responses of a file, and what else it says.

    Raises:
        DataError: there is no such file, it is not one of ours, or it is empty.
    """
    path = Path(path)
    table, about = _table(path)
    if not table.num_rows:
        raise DataError(f"{path} has no rollouts; sample some with `llmac rollouts`")
    prompts: dict[tuple[Any, ...], Prompt] = {}
    rows = table.to_pylist()
    trajectories = tuple(_trajectory(row, prompts) for row in rows)
    estimates = tuple(_optional_tuple(row["monte_carlo"]) for row in rows)
    return StoredRollouts(
        trajectories=trajectories,
        about=about,
        monte_carlo=estimates if any(e is not None for e in estimates) else (),
    )


def check_storable(prompts: Iterable[Prompt]) -> None:
    """Refuse prompts whose columns a file cannot hold; ask before sampling, which is the expensive part.

    Raises:
        DataError: a column holds something that JSON has no word for.
    """
    for prompt in prompts:
        for name, value in {"prompt": prompt.source, **prompt.columns}.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"column {name} of prompt {prompt.id} is a {type(value).__name__}, and a rollout file holds JSON "
                    f"only ({error}); turn it into text or numbers, or take the column out of the dataset"
                ) from error


def vocabulary_mark(vocabulary: Mapping[str, int]) -> str:
    """A short text that differs between tokenizers that give a token different ids; `about["vocabulary"]`.

    >>> vocabulary_mark({"a": 0, "b": 1}) == vocabulary_mark({"b": 1, "a": 0})
    True
    >>> vocabulary_mark({"a": 0, "b": 1}) == vocabulary_mark({"a": 1, "b": 0})
    False
    """
    digest = hashlib.blake2b(digest_size=8)
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        digest.update(f"{index} {token!r}\n".encode())
    return digest.hexdigest()


def _check_monte_carlo(
    trajectories: Sequence[Trajectory], monte_carlo: Sequence[Sequence[float | None] | None]
) -> None:
    if monte_carlo and len(monte_carlo) != len(trajectories):
        raise DataError(
            f"monte_carlo has {len(monte_carlo)} entries for {len(trajectories)} responses; each has one, or None"
        )
    for trajectory, values in zip(trajectories, monte_carlo, strict=False):
        if values is not None and len(values) != len(trajectory.response_ids):
            raise DataError(
                f"monte_carlo of a response to prompt {trajectory.prompt.id} has {len(values)} values for "
                f"{len(trajectory.response_ids)} tokens; each state before a token has one, or None"
            )


def _row(trajectory: Trajectory, monte_carlo: Sequence[float | None] | None) -> dict[str, Any]:
    prompt = trajectory.prompt
    # Lone surrogates (from JSON escapes) are not UTF-8; Arrow refuses the whole table for one.
    text = trajectory.response_text.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return {
        "prompt_id": prompt.id,
        "prompt_token_ids": prompt.token_ids,
        "source": json.dumps(prompt.source),
        "columns": json.dumps(dict(prompt.columns)),
        "response": text,
        "response_ids": trajectory.response_ids,
        "action_mask": trajectory.action_mask,
        "sampler_logprobs": trajectory.sampler_logprobs,
        "finish": str(trajectory.finish),
        "group": trajectory.group,
        "reward": trajectory.reward,
        "reward_parts": json.dumps(dict(trajectory.reward_parts)),
        "policy_version": trajectory.policy_version,
        "fresh_from": trajectory.fresh_from,
        "value_span": trajectory.value_span,
        "sibling_std": trajectory.sibling_std,
        "baseline_reward": trajectory.baseline_reward,
        "age": trajectory.age,
        "monte_carlo": monte_carlo,
    }


def _trajectory(row: Mapping[str, Any], prompts: dict[tuple[Any, ...], Prompt]) -> Trajectory:
    """One row; siblings share the prompt that the first of them left in `prompts`."""
    key = (row["prompt_id"], tuple(row["prompt_token_ids"]), row["source"], row["columns"])
    if key not in prompts:
        prompts[key] = Prompt(
            id=key[0], token_ids=key[1], source=json.loads(key[2]), columns=json.loads(key[3])
        )
    return Trajectory(
        prompt=prompts[key],
        response_ids=tuple(row["response_ids"]),
        action_mask=tuple(row["action_mask"]),
        sampler_logprobs=tuple(row["sampler_logprobs"]),
        finish=Finish(row["finish"]),
        group=row["group"],
        reward=row["reward"],
        reward_parts=json.loads(row["reward_parts"]),
        response_text=row["response"],
        fresh_from=row["fresh_from"],
        policy_version=row["policy_version"],
        value_span=_optional_tuple(row["value_span"]),  # pyright: ignore[reportArgumentType]
        **{name: row.get(name, value) for name, value in _LATER.items()},
    )


def _optional_tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _table(path: Path) -> tuple[pyarrow.Table, Mapping[str, Any]]:
    if not path.is_file():
        folder = path.parent
        siblings = sorted(p.name for p in folder.glob("*.parquet")) if folder.is_dir() else []
        raise DataError(f"there is no rollout file {path}.{did_you_mean(path.name, siblings)}")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a rollout file: it cannot be read as Parquet ({error}); `llmac rollouts` writes such files"
        ) from error
    description = (table.schema.metadata or {}).get(KEY)
    if description is None:
        found = ", ".join(table.column_names[:8])
        raise DataError(
            f"{path} is Parquet, but not a rollout file: its columns are {found}. `llmac rollouts` samples and writes "
            "one, with the token ids and rewards that training needs"
        )
    said = json.loads(description)
    missing = [name for name in _SCHEMA if name not in {*table.column_names, *_LATER}]
    if said["format"] > FORMAT or missing:
        raise DataError(
            f"{path} has format {said['format']} and lacks the columns {missing}; this llmac reads format {FORMAT}. "
            "Update llmac, or sample anew"
        )
    return table, said["about"]
