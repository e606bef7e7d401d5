"""Where rows come from, and what is said when they do not come."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest

from llmac.data.tables import read_table, rows_of
from llmac.errors import DataError

SHIPPED = Path(__file__).parents[1] / "data"
ROWS = [
    {"question": "1+1?", "answer": "2", "n": 1},
    {"question": 'a "quoted",\nbroken é line', "answer": "007", "n": 2},
]


def read(path, *, subset=None, split="train"):
    return read_table(str(path), subset=subset, split=split)


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    plain = path.with_suffix("") if suffix.endswith(".gz") else path
    rows = [{**row, "answer": f"x{row['answer']}"} for row in ROWS]
    if plain.suffix == ".jsonl":
        plain.write_bytes(as_lines(rows))
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows))
    elif plain.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(plain)
    else:
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(path) == rows


def test_a_json_object_with_one_list_is_that_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read(path) == ROWS


def test_json_values_keep_their_types(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"a": "2024-01-01T00:00:00", "b": 1}, {"a": 5, "c": None}]
    path.write_bytes(as_lines(rows))
    assert read(path) == rows


def test_a_folder_with_a_file_for_each_split(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS)))
    (tmp_path / "test.jsonl").write_bytes(as_lines(ROWS[:1]))
    assert read(tmp_path) == ROWS
    assert read(tmp_path, split="test") == ROWS[:1]


def test_a_folder_of_save_to_disk(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "two", split="test") == ROWS[:1]
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        read(tmp_path / "two", split="dev")


def test_a_subset_is_a_subfolder(tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train.jsonl").write_bytes(as_lines(ROWS))
    assert read(tmp_path, subset="main") == ROWS
    with pytest.raises(DataError, match="no such subfolder"):
        read(tmp_path, subset="mian")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[8:]", [8, 9]),
        ("train[:90%]", range(9)),
        ("train[90%:]", [9]),
        ("train[-2:]", [8, 9]),
        ("train[2:4]", [2, 3]),
    ],
)
def test_slices_of_a_split(tmp_path, split, numbers):
    rows = [{"n": n} for n in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_lines(rows))
    assert [row["n"] for row in read(path, split=split)] == list(numbers)
    assert [row["n"] for row in rows_of(rows, split=split, limit=None)] == list(numbers)


@pytest.mark.parametrize("split", ["", "train[", "train[a:b]", "train[1]"])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(DataError, match="is not a split"):
        rows_of(ROWS, split=split, limit=None)


def test_a_file_has_no_other_split_and_no_subset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_lines(ROWS))
    with pytest.raises(DataError, match=r"data\.split is 'test', but .*rows\.jsonl is a file"):
        read(path, split="test")
    with pytest.raises(DataError, match=r"Set data.subset to null"):
        read(path, subset="main")


def test_tables_in_memory():
    table = datasets.Dataset.from_list(ROWS)
    assert rows_of(ROWS, split="train", limit=None) == ROWS
    assert rows_of(table, split="train", limit=None) == ROWS
    assert rows_of(datasets.DatasetDict(test=table), split="test[:1]", limit=None) == ROWS[:1]
    assert rows_of(table.to_iterable_dataset(), split="train", limit=1) == ROWS[:1]


def test_tables_in_memory_that_are_none():
    with pytest.raises(DataError, match=r"set data.limit"):
        rows_of((row for row in ROWS), split="train", limit=None)
    with pytest.raises(DataError, match="row 1 of the dataset is a str, not a dict"):
        rows_of([ROWS[0], "x"], split="train", limit=None)
    with pytest.raises(DataError, match="not a int"):
        rows_of(3, split="train", limit=None)
    with pytest.raises(DataError, match="no split 'train'; it has: test"):
        rows_of({"test": ROWS}, split="train", limit=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("rows.jsonl", b'{"a": 1}\n\n[1]\n', "line 3: a row is an object, not a list"),
        ("rows.jsonl", b'{"a": "\xff"}\n', "UnicodeDecodeError"),
        ("rows.json", b'{"a": 1}', "expected a list of objects"),
        ("rows.json", b"[1, 2]", "expected a list of objects"),
        ("rows.json", b"nope", "cannot be read"),
        ("rows.jsonl.gz", b"not gzip", "cannot be read"),
        ("rows.parquet", b"not parquet", "cannot be read"),
        ("rows.txt", b"hello", "not a dataset file"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["./gsm8k", "rows.jsonl", "some/folder/deep/rows.json", "~/nothing-here"]
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(DataError, match="there is no file or folder"):
        read(name)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "gsm8k_train.jsonl").write_bytes(as_lines(ROWS))
    with pytest.raises(DataError, match=r"Did you mean .*gsm8k_train\.jsonl"):
        read(tmp_path / "gsm8k_trian.jsonl")


def test_a_folder_that_holds_no_dataset_is_an_error(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DataError, match=r"cannot be read"):
        read(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="more than one file for the split train"):
        read(tmp_path)


def test_an_empty_dataset_is_an_error(tmp_path, load):
    (tmp_path / "rows.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"the dataset rows/train is empty"):
        load(name=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="is empty"):
        load([])


def test_real_problems_from_a_file(load):
    prompts, report = load(
        name=str(SHIPPED / "gsm8k_train.jsonl"), prompt="{question}\nPut the answer in \\boxed{}."
    )
    assert report.kept == 40
    assert prompts[0].id == "gsm8k/train/0"
    assert prompts[0].source.startswith("Natalia sold clips")
    assert prompts[0].source.endswith("\\boxed{}.")
    assert prompts[0].columns["answer"].endswith("#### 72")
