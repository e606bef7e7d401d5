"""Rows of a dataset, wherever it is: Hub id, file, folder, or an object already in memory."""

import difflib
import gzip
import io
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmac.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")

Row = dict[str, Any]


def read_table(name: str, *, subset: str | None, split: str) -> list[Row]:
    """All rows of a split.

    `name` is, in this order: a `.jsonl`, `.json`, `.parquet` or `.csv` file (also `.gz`); a folder written by
    `save_to_disk`, or with one such file a split (`train.jsonl`, `test.jsonl`), or anything else
    `datasets.load_dataset` reads; a Hub id.

    Args:
        name: where the dataset is.
        subset: configuration of a Hub dataset, or subfolder of a folder.
        split: `train`, or a slice as in `datasets`: `train[:1000]`, `train[90%:]`.

    Raises:
        DataError: there is nothing readable there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if subset is not None:
            raise DataError(
                f"data.subset is {subset!r}, but {name} is a file. Set data.subset to null."
            )
        if _split_name(split) != "train":
            raise DataError(
                f"data.split is {split!r}, but {name} is a file and all of it is the split 'train'. "
                "Name another file, or write a slice such as train[90%:]."
            )
        return cut(read_file(path), split)
    if path.is_dir():
        return _read_folder(path, subset, split)
    _refuse_missing_path(name, path)
    return _read_with_datasets(name, subset, split)


def rows_of(table: Any, *, split: str, limit: int | None) -> list[Row]:
    """Rows of an object in memory: a `datasets` Dataset, DatasetDict or IterableDataset, or dicts."""
    if isinstance(table, Mapping):  # a DatasetDict, or a dict of lists of rows
        name = _split_name(split)
        if name not in table:
            raise DataError(
                f"the dataset has no split {name!r}; it has: {', '.join(map(str, table))}"
            )
        return rows_of(table[name], split=split.replace(name, "train", 1), limit=limit)
    if isinstance(table, str) or not isinstance(table, Iterable):
        raise DataError(
            f"a dataset is a datasets.Dataset or an iterable of dicts, not a {type(table).__name__}"
        )
    if not hasattr(table, "__len__") and limit is None:
        raise DataError(
            "the dataset has no length (it is streamed); set data.limit to read that many rows"
        )
    rows = list(itertools.islice(table, limit) if not hasattr(table, "__len__") else table)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {index} of the dataset is a {type(row).__name__}, not a dict of columns"
            )
    return cut([dict(row) for row in rows], split)


def read_file(path: Path) -> list[Row]:
    """Rows of one `.jsonl`, `.json`, `.parquet` or `.csv` file, also gzipped.

    Raises:
        DataError: unknown kind or unreadable content; names file and line.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in SUFFIXES:
        raise DataError(
            f"{path} is not a dataset file; there are: {', '.join(SUFFIXES)}, also with .gz"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if kind == ".jsonl":
            return _json_lines(content.decode("utf-8"), path)
        if kind == ".json":
            return _json_rows(json.loads(content.decode("utf-8")), path)
        return _arrow_rows(content, kind)
    except (
        OSError,
        EOFError,
        ValueError,
    ) as error:  # bad gzip, bad UTF-8, bad JSON, and pyarrow's ArrowInvalid
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def cut(rows: list[Row], split: str) -> list[Row]:
    """The slice that a split such as `train[:100]` or `train[-10%:]` asks for.

    >>> cut([{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}], "train[50%:]")
    [{'n': 2}, {'n': 3}]
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise DataError(
            f"data.split {split!r} is not a split; write train, train[:100] or train[90%:]"
        )

    def position(text: str | None) -> int | None:
        if not text:
            return None
        return round(int(text[:-1]) * len(rows) / 100) if text.endswith("%") else int(text)

    return rows[position(match["start"]) : position(match["stop"])]


_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def _split_name(split: str) -> str:
    return split.partition("[")[0]


def _read_folder(folder: Path, subset: str | None, split: str) -> list[Row]:
    if subset is not None:
        if not (folder / subset).is_dir():
            raise DataError(
                f"data.subset is {subset!r}, but {folder} has no such subfolder. Set data.subset to null."
            )
        folder = folder / subset
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        import datasets  # at use: a second of import time

        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets raises many kinds
            raise DataError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
        if isinstance(saved, datasets.Dataset) and _split_name(split) not in (
            str(saved.split),
            "train",
        ):
            raise DataError(f"data.split is {split!r}, but {folder} holds the split {saved.split}")
        return rows_of(saved, split=split, limit=None)
    name = _split_name(split)
    files = [folder / f"{name}{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz")]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} has more than one file for the split {name}: {', '.join(f.name for f in found)}"
        )
    if found:
        return cut(read_file(found[0]), split)
    return _read_with_datasets(str(folder), None, split)


def _refuse_missing_path(name: str, path: Path) -> None:
    """A Hub id is `owner/name`; whatever looks like a path and does not exist is a mistake, not a download."""
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith((*SUFFIXES, ".gz"))
    if not looks_like_path and name.count("/") <= 1:
        return
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, neighbours, n=1)
    hint = f" Did you mean {path.parent / close[0]}?" if close else ""
    raise DataError(f"data.name: there is no file or folder {name} (from {Path.cwd()}).{hint}")


def _read_with_datasets(name: str, subset: str | None, split: str) -> list[Row]:
    import datasets  # at use: a second of import time

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (
        Exception
    ) as error:  # datasets raises many kinds: not found, no such split, no connection ...
        place = f"{name!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
        raise DataError(
            f"the dataset {place} cannot be read: {type(error).__name__}: {error}"
        ) from error
    return [dict(row) for row in table]


def _json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error.msg}: {line[:60]!r}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: a row is an object, not a {type(row).__name__}"
            )
        rows.append(row)
    return rows


def _json_rows(content: Any, path: Path) -> list[Row]:
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, Sequence) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path}: expected a list of objects, or an object with one such list")
    return [dict(row) for row in content]


def _arrow_rows(content: bytes, kind: str) -> list[Row]:
    if kind == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    import pyarrow.csv

    quoted_lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(io.BytesIO(content), parse_options=quoted_lines).to_pylist()
