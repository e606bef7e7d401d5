"""Rollout files: what goes in comes out, only complete files appear, and what is no such file says so."""

import dataclasses
import datetime
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from llmac.core.types import Finish, Prompt, Trajectory
from llmac.errors import DataError
from llmac.rollout_store import (
    KEY,
    check_storable,
    read_rollouts,
    read_store,
    vocabulary_mark,
    write_rollouts,
)

MESSAGES = [{"role": "user", "content": "2 + 2 = ?"}]


def full(**changes):
    """A response in which no field has its default."""
    prompt = Prompt(
        id="row 7", token_ids=(5, 70_000, 7), source=MESSAGES, columns={"answer": 4, "hints": ["a"]}
    )
    fields = {
        "prompt": prompt,
        "response_ids": (8, 9, 1),
        "action_mask": (True, False, True),
        "sampler_logprobs": (-0.1, 0.0, -1e-30),
        "finish": Finish.LENGTH,
        "group": 3,
        "reward": 0.1,
        "reward_parts": {"exact": 0.1, "format": None},
        "response_text": "4 ",
        "fresh_from": 1,
        "policy_version": 12,
        "value_span": (0.25, 0.5),
        "sibling_std": 0.125,
        "baseline_reward": 0.25,
        "age": 2,
    }
    return Trajectory(**(fields | changes))


def test_every_field_of_a_response_comes_back_as_it_was(tmp_path):
    given = full()
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Trajectory)
        if field.default is not dataclasses.MISSING
    }
    assert all(getattr(given, name) != default for name, default in defaults.items())
    write_rollouts(tmp_path / "a.parquet", [given])
    assert read_rollouts(tmp_path / "a.parquet") == [given]


def test_a_file_from_before_there_were_trees_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    later = {"sibling_std": None, "baseline_reward": None, "age": 0}
    write_rollouts(path, [full(**later)])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop(list(later)), path)
    assert read_rollouts(path) == [full(**later)]


def test_responses_without_tokens_reward_or_ascii_text_keep_their_place(tmp_path):
    given = [
        full(),
        full(response_ids=(), action_mask=(), sampler_logprobs=(), fresh_from=0),
        full(reward=None, finish=Finish.PAUSED, value_span=None, reward_parts={}),
        full(response_text="vier \N{SNOWMAN}", prompt=Prompt(id="b", token_ids=(1,), source="?")),
    ]
    write_rollouts(tmp_path / "a.parquet", given)
    assert read_rollouts(tmp_path / "a.parquet") == given


def test_text_that_is_not_unicode_is_escaped_and_ids_are_untouched(tmp_path):
    write_rollouts(tmp_path / "a.parquet", [full(response_text="\ud83d")])
    [back] = read_rollouts(tmp_path / "a.parquet")
    assert (back.response_text, back.response_ids) == ("\\ud83d", (8, 9, 1))


def test_siblings_share_one_prompt_in_memory(tmp_path):
    write_rollouts(tmp_path / "a.parquet", [full(), full(reward=1.0)])
    first, second = read_rollouts(tmp_path / "a.parquet")
    assert first.prompt is second.prompt


def test_what_is_known_of_the_file_and_of_states_comes_back(tmp_path):
    estimates = [(0.5, None, 1.0), None]
    write_rollouts(
        tmp_path / "a.parquet", [full(), full()], {"model": "tiny"}, monte_carlo=estimates
    )
    stored = read_store(tmp_path / "a.parquet")
    assert stored.about == {"model": "tiny"}
    assert list(stored.monte_carlo) == estimates
    write_rollouts(tmp_path / "a.parquet", [full()])
    assert read_store(tmp_path / "a.parquet").monte_carlo == ()


def test_people_can_read_the_file(tmp_path):
    write_rollouts(tmp_path / "a.parquet", [full()])
    [row] = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert (row["prompt_id"], row["response"], row["reward"]) == ("row 7", "4 ", 0.1)
    assert json.loads(row["source"]) == MESSAGES


def test_a_file_is_replaced_by_a_complete_one_and_never_written_into(tmp_path):
    path, reader = tmp_path / "a.parquet", tmp_path / "reader"
    write_rollouts(path, [full()])
    before = path.read_bytes()
    os.link(path, reader)  # somebody who has the older file open
    with pytest.raises(OverflowError):
        write_rollouts(path, [full(group=2**70)])
    write_rollouts(path, [full(reward=1.0)])
    assert reader.read_bytes() == before != path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "reader"]


def test_columns_that_no_file_can_hold_are_refused_by_name():
    when = Prompt(id="p3", token_ids=(1,), source="?", columns={"day": datetime.date(2020, 1, 1)})
    with pytest.raises(DataError, match=r"column day of prompt p3 is a date.*take the column out"):
        check_storable([when])


def test_nothing_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="there are no rollouts to write"):
        write_rollouts(tmp_path / "a.parquet", [])
    assert list(tmp_path.iterdir()) == []


def test_estimates_that_do_not_fit_the_responses_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"has 1 entries for 2 responses"):
        write_rollouts(tmp_path / "a.parquet", [full(), full()], monte_carlo=[None])
    with pytest.raises(DataError, match=r"prompt row 7 has 2 values for 3 tokens"):
        write_rollouts(tmp_path / "a.parquet", [full()], monte_carlo=[(0.1, 0.2)])


def test_a_file_that_is_not_there_is_missed_with_a_suggestion(tmp_path):
    write_rollouts(tmp_path / "rollouts.parquet", [full()])
    with pytest.raises(DataError, match=r"no rollout file .*Did you mean 'rollouts.parquet'\?"):
        read_rollouts(tmp_path / "rolouts.parquet")
    with pytest.raises(DataError, match="there is no rollout file"):
        read_rollouts(tmp_path / "nowhere/a.parquet")


def test_other_files_and_newer_ones_are_told_from_ours(tmp_path):
    text, other, newer, empty = (tmp_path / f"{name}.parquet" for name in "abcd")
    text.write_text("prompt,reward\n")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rollouts(text)

    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"]}), other)
    with pytest.raises(DataError, match=r"not a rollout file: its columns are question\."):
        read_rollouts(other)

    write_rollouts(newer, [full()])
    table = pyarrow.parquet.read_table(newer)
    said = json.dumps({"format": 99, "about": {}}).encode()
    pyarrow.parquet.write_table(table.replace_schema_metadata({KEY: said}), newer)
    with pytest.raises(DataError, match=r"has format 99 .* Update llmac"):
        read_rollouts(newer)

    pyarrow.parquet.write_table(table.slice(0, 0), empty)
    with pytest.raises(DataError, match="has no rollouts"):
        read_rollouts(empty)


def test_the_mark_of_a_vocabulary_tells_tokenizers_of_equal_size_apart():
    assert vocabulary_mark({"a": 0, "b": 1}) != vocabulary_mark({"a": 0, "c": 1})
