"""Datasets become tokenized prompts, and prompts an endless stream that can be resumed."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmac.core.types import Messages, Prompt
from llmac.data.tables import Row, read_table, rows_of
from llmac.data.tokenizing import tokenize
from llmac.errors import CheckpointError, ConfigError, DataError, did_you_mean

if TYPE_CHECKING:  # `config` is a room above this one
    from transformers import PreTrainedTokenizerBase

    from llmac.config.schema import DataConfig

KNOWN_PROMPT_COLUMNS = ("question", "problem")
"""Names under which published datasets keep their prompt, tried in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of a dataset."""

    source: str
    rows: int
    """Read, after `limit`."""
    kept: int
    too_long: int
    """Left out because of their length."""
    longest_tokens: int
    """Longest kept prompt."""
    mapping: Mapping[str, str]
    """Known columns that were recognised: what it is used as -> where it came from."""
    columns: tuple[str, ...]
    """What reward functions can ask for."""

    def lines(self) -> list[str]:
        """What a user should know, one sentence a line."""
        lines = [
            f"{self.source}: {self.kept} prompts, the longest has {self.longest_tokens} tokens"
        ]
        if self.mapping:
            pairs = ", ".join(f"{new} <- {old}" for new, old in self.mapping.items())
            lines.append(f"{self.source}: columns recognised: {pairs}")
        if self.too_long:
            lines.append(
                f"{self.source}: {self.too_long} of {self.rows} prompts are too long and left out"
            )
        return lines


def load_prompts(
    config: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    model_max_tokens: int | None,
    max_new_tokens: int,
    rows: Any = None,
) -> tuple[list[Prompt], PromptReport]:
    r"""Read a dataset and tokenize its prompts.

    The prompt is the first of: the template `prompt`, in which `{column}` stands for a column's value, `{{` and `}}`
    for braces, and other braces for themselves (`\boxed{}`); the column `prompt_column`; a column `prompt`; a known
    name (`question`, `problem`). It is a string or a list of chat messages. verl's `reward_model.ground_truth` becomes
    the columns `ground_truth` and `solution`. All columns pass through to reward functions.

    `chat`: `auto` applies the chat template to messages, and to strings if there is a `system` message; `always` to
    strings too; `never` to nothing. Reward functions see the prompt as the dataset has it, a string or messages.

    Args:
        config: a recipe's `data` section.
        tokenizer: the policy's.
        model_max_tokens: prompt and response must fit; None = unknown.
        max_new_tokens: response length, tokens, to leave room for.
        rows: a dataset in memory, instead of the one `config.name` names.

    Returns:
        The prompts in the dataset's order, and what became of the dataset.

    Raises:
        DataError: unreadable or empty, a column is missing, or a prompt is too long and `on_too_long` is `error`.
        ConfigError: the fields contradict each other, or a chat template is needed and there is none.
    """
    if config.prompt is not None and config.prompt_column is not None:
        raise ConfigError(
            "data.prompt and data.prompt_column both say what the prompt is; set one of them"
        )
    source, table = _table(config, rows)
    if not table:
        raise DataError(f"the dataset {source} is empty")
    table, mapping = _known_columns(_renamed(table, config.columns, source))
    table, twins = _with_answers(table)
    mapping |= twins
    read = _prompt_reader(config, table, mapping, source)
    ids = _row_ids(table, source)
    sources = [_checked(read(row), id_) for row, id_ in zip(table, ids, strict=True)]
    token_ids = tokenize(sources, ids, config, tokenizer)
    limit = _length_limit(config, model_max_tokens, max_new_tokens)
    columns = tuple(dict.fromkeys(name for row in table for name in row if name != "prompt"))
    prompts, too_long = [], 0
    for id_, seen, tokens, row in zip(ids, sources, token_ids, table, strict=True):
        if limit is not None and len(tokens) > limit.tokens:
            if config.on_too_long == "error":
                raise DataError(_too_long(id_, len(tokens), limit))
            too_long += 1
            continue
        passed = {name: row.get(name) for name in columns}
        prompts.append(Prompt(id=id_, token_ids=tokens, source=seen, columns=passed))
    if not prompts:
        assert limit is not None
        raise DataError(
            f"no prompt of {source} is left: all {len(table)} have more than {limit.tokens} tokens ({limit.reason})"
        )
    report = PromptReport(
        source=source,
        rows=len(table),
        kept=len(prompts),
        too_long=too_long,
        longest_tokens=max(len(p.token_ids) for p in prompts),
        mapping=mapping,
        columns=columns,
    )
    return prompts, report


def _digest(prompts: Sequence[Prompt]) -> str:
    """Tells one list of prompts from another."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.id} {prompt.token_ids}\n".encode())
    return digest.hexdigest()


class PromptStream:
    """This rank's share of an endless stream of prompts (a `core.protocols.PromptSource`).

    Epoch e is a permutation drawn from (seed, e). Rank r of W owns positions r, r + W, r + 2W ... of the endless
    concatenation of epochs, so ranks that take the same number have together taken what one process would have, and
    ranks that take different numbers never take the same position.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """Start at the beginning of epoch 0.

        Args:
            prompts: the same list on every rank.
            rank: this process.
            world_size: number of processes.
            shuffle: False = the dataset's order, every epoch.
            seed: of the permutations.
        """
        if not prompts:
            raise DataError("a prompt stream needs at least one prompt")
        self._prompts = prompts
        self._rank, self._world_size = rank, world_size
        self._shuffle, self._seed = shuffle, seed
        self._digest = _digest(prompts)
        self._taken = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def take(self, count: int) -> list[Prompt]:
        """This rank's next `count` prompts."""
        first = self._taken
        self._taken += count
        return [self._at(self._rank + k * self._world_size) for k in range(first, first + count)]

    @property
    def epoch(self) -> float:
        """Passes through the dataset so far, counting all ranks as equally far."""
        return self._taken * self._world_size / len(self._prompts)

    def state(self) -> dict[str, Any]:
        """Where the stream is, as plain numbers."""
        return {
            "position": self._taken * self._world_size,
            "prompts": len(self._prompts),
            "shuffle": self._shuffle,
            "seed": self._seed,
            "content": self._digest,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, possibly with another number of ranks.

        Raises:
            CheckpointError: the state is of another dataset, seed or order.
        """
        for name, now in self.state().items():
            if name != "position" and state.get(name) != now:
                raise CheckpointError(
                    f"the prompt stream was saved with {name} = {state.get(name)} and now has {now}; "
                    "resume with the same dataset, seed and order, or start a new run"
                )
        # Rounded up: with another number of ranks a few prompts may be passed over, none is taken twice.
        self._taken = -(-int(state["position"]) // self._world_size)

    def save(self, directory: Path) -> None:
        """Write `state()` into a checkpoint."""
        if self._rank == 0:
            (directory / "prompts.json").write_text(json.dumps(self.state()), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """`restore` from a checkpoint."""
        self.restore(json.loads((directory / "prompts.json").read_text(encoding="utf-8")))

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._order[0]:
            self._order = (epoch, self._permutation(epoch))
        return self._prompts[self._order[1][place]]

    def _permutation(self, epoch: int) -> Sequence[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
        return order


@dataclass(frozen=True, slots=True)
class _Limit:
    tokens: int
    reason: str


def _length_limit(
    config: "DataConfig", model_max: int | None, max_new_tokens: int
) -> _Limit | None:
    limits = []
    if config.max_prompt_tokens is not None:
        limits.append(_Limit(config.max_prompt_tokens, "data.max_prompt_tokens"))
    if model_max is not None:
        room = model_max - max_new_tokens
        reason = f"the model's {model_max} less rollout.max_new_tokens = {max_new_tokens}"
        if room < 1:
            raise DataError(
                f"there is no room for a prompt: {reason} leaves {room} tokens. Lower rollout.max_new_tokens."
            )
        limits.append(_Limit(room, reason))
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _too_long(id_: str, tokens: int, limit: _Limit) -> str:
    return (
        f"prompt {id_} has {tokens} tokens; at most {limit.tokens} are allowed ({limit.reason}). "
        "Set data.on_too_long: skip to leave such prompts out (counted), or change the limit."
    )


def _table(config: "DataConfig", rows: Any) -> tuple[str, list[Row]]:
    if rows is None:
        table = read_table(config.name, subset=config.subset, split=config.split)
        stem = config.name.rstrip("/").rpartition("/")[2].partition(".")[0]
    else:
        table = rows_of(rows, split=config.split, limit=config.limit)
        stem = "rows"
    return f"{stem}/{config.split}", table[: config.limit]


def _row_ids(table: Sequence[Row], source: str) -> list[str]:
    """The column `id` if it tells the rows apart, else the row's place."""
    given = [row.get("id") for row in table]
    if all(isinstance(id_, (str, int)) for id_ in given) and len(set(given)) == len(given):
        return [str(id_) for id_ in given]
    return [f"{source}/{index}" for index in range(len(table))]


def _renamed(table: list[Row], renames: Mapping[str, str], source: str) -> list[Row]:
    """`renames` is new name -> old name; an old name with dots reaches into nested columns, which stay."""
    if not renames:
        return table
    present = _columns(table)
    for new, old in renames.items():
        if old not in present and old.partition(".")[0] not in present:
            raise DataError(
                f"data.columns takes {new!r} from {old!r}, which {source} lacks.{did_you_mean(old, present)}"
            )
        if new in present and new not in renames.values():
            raise DataError(f"data.columns makes a column {new!r}, which {source} has already")
    gone = set(renames.values())
    return [
        {name: value for name, value in row.items() if name not in gone}
        | {new: _reach(row, old, source) for new, old in renames.items()}
        for row in table
    ]


def _reach(row: Row, name: str, source: str) -> Any:
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(
                f"data.columns: a row of {source} has nothing at {name!r}: {part!r} is missing"
            )
        value = value[part]
    return value


def _known_columns(table: list[Row]) -> tuple[list[Row], dict[str, str]]:
    """The nested ground truth of verl's files under the names reward functions ask for."""
    present = _columns(table)
    new = [name for name in ("ground_truth", "solution") if name not in present]
    filled = []
    for row in table:
        nested = row.get("reward_model")
        if not new or not isinstance(nested, Mapping) or "ground_truth" not in nested:
            return table, {}
        filled.append(row | dict.fromkeys(new, nested["ground_truth"]))
    return filled, dict.fromkeys(new, "reward_model.ground_truth")


def _with_answers(table: Sequence[Row]) -> tuple[Sequence[Row], dict[str, str]]:
    """`answer` and `solution` under both names: published datasets have one, reward functions ask for the other."""
    present = _columns(table)
    for have, want in (("answer", "solution"), ("solution", "answer")):
        if have in present and want not in present:
            return [row | {want: row.get(have)} for row in table], {want: have}
    return table, {}


def _prompt_reader(
    config: "DataConfig", table: Sequence[Row], mapping: dict[str, str], source: str
) -> Callable[[Row], Any]:
    present = _columns(table)
    if config.prompt is not None:
        return _Template(config.prompt, present, source)
    column = config.prompt_column
    if column is not None and column not in present:
        raise DataError(
            f"data.prompt_column is {column!r}, which {source} lacks.{did_you_mean(column, present)}"
        )
    if column is None:
        known = [name for name in ("prompt", *KNOWN_PROMPT_COLUMNS) if name in present]
        if not known:
            raise DataError(
                f"{source} has no column that is known to be a prompt (prompt, {', '.join(KNOWN_PROMPT_COLUMNS)}); "
                f"it has: {', '.join(present)}. Set data.prompt_column, or data.prompt to a template such as "
                f'"{{{present[0]}}}".'
            )
        column = known[0]
        if column != "prompt":
            mapping["prompt"] = column
    return lambda row: row.get(column)


class _Template:
    r"""`{column}` is a value, `{{` and `}}` are braces, other braces stand for themselves."""

    _PARTS = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}")

    def __init__(self, text: str, present: Sequence[str], source: str) -> None:
        self._text = text
        self._fields = [
            name
            for match in self._PARTS.finditer(text)
            if (name := match[1]) is not None and (name in present or name.isidentifier())
        ]
        for name in self._fields:
            if name not in present:
                raise DataError(
                    f"data.prompt contains {{{name}}}, and {source} has no such column."
                    f"{did_you_mean(name, list(present))} For literal braces write {{{{{name}}}}}."
                )
        if not self._fields:
            raise DataError(
                f"data.prompt contains no column, so every prompt would be the same: {text!r}. "
                f"Write {{column}} with one of: {', '.join(present)}"
            )

    def __call__(self, row: Row) -> str | None:
        if any(row.get(name) is None for name in self._fields):
            return None

        def filled(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            return str(row[match[1]]) if match[1] in self._fields else match[0]

        return self._PARTS.sub(filled, self._text)


def _checked(value: Any, id_: str) -> str | Messages:
    if isinstance(value, str):
        return value
    is_messages = (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value)
    )
    if is_messages:
        return [dict(message) for message in value]
    what = "empty" if value is None else f"a {type(value).__name__}"
    raise DataError(
        f"the prompt of {id_} is {what}; expected a string or a list of messages with role and content"
    )


def _columns(table: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in table for name in row))
