"""A checkpoint is whole or it is not there, and what is restored is what was saved."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch

from llmac.errors import CheckpointError
from llmac.runtime.checkpoint import CheckpointStore, RandomState, Remembered
from llmac.runtime.context import Runtime


class Blob:
    """A role that is one string."""

    def __init__(self, content: str = "") -> None:
        self.content = content

    def save(self, directory: Path) -> None:
        (directory / "blob.txt").write_text(self.content)

    def load(self, directory: Path) -> None:
        self.content = (directory / "blob.txt").read_text()


class Broken(Blob):
    """Fails after the first of its files."""

    def save(self, directory: Path) -> None:
        super().save(directory)
        raise OSError(28, "No space left on device")


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


@pytest.fixture
def open_store(runtime, tmp_path):
    def open_store(*, keep_last: int = 2, fingerprint: str = "a") -> CheckpointStore:
        return CheckpointStore(
            tmp_path / "checkpoints", keep_last=keep_last, runtime=runtime, fingerprint=fingerprint
        )

    return open_store


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_fresh_directory_starts_at_step_0(open_store):
    store = open_store()
    assert store.latest() is None
    assert store.restore_latest({"policy": Blob()}) == 0


def test_the_latest_checkpoint_comes_back_into_every_role(open_store):
    store = open_store()
    store.save(3, {"policy": Blob("p3"), "critic": Blob("c3")})
    saved = store.save(10, {"policy": Blob("p10"), "critic": Blob("c10")})
    again = open_store()
    assert again.latest() == saved
    policy, critic = Blob(), Blob()
    assert again.restore_latest({"policy": policy, "critic": critic}) == 10
    assert (policy.content, critic.content) == ("p10", "c10")


def test_only_the_newest_are_kept(open_store, tmp_path):
    store = open_store(keep_last=2)
    for step in (8, 9, 10, 11):
        store.save(step, {"policy": Blob(str(step))})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["llmac.json", "step-00000010", "step-00000011"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(open_store, tmp_path, caplog):
    program = textwrap.dedent("""
        import sys, time
        from llmac.runtime.checkpoint import CheckpointStore
        from llmac.runtime.context import Runtime

        class Slow:
            def __init__(self, seconds): self.seconds = seconds
            def save(self, directory):
                with (directory / "blob.txt").open("w") as file:
                    file.write("first")
                    file.flush()
                    print("writing", flush=True)
                    time.sleep(self.seconds)
                    file.write(" second")
            def load(self, directory): ...

        runtime = Runtime.create(seed=0, output=None)
        store = CheckpointStore(sys.argv[1], keep_last=1, runtime=runtime, fingerprint="a")
        store.save(1, {"policy": Slow(0)})
        store.save(2, {"policy": Slow(600)})
    """)
    directory = tmp_path / "checkpoints"
    command = [sys.executable, "-c", program, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["writing\n"] * 2
        os.kill(process.pid, signal.SIGKILL)
    assert (directory / ".saving-step-00000002" / "policy" / "blob.txt").exists()

    policy = Blob()
    with caplog.at_level(logging.WARNING):
        assert open_store().restore_latest({"policy": policy}) == 1
    assert policy.content == "first second"
    assert "step-00000002: it was not finished" in caplog.text

    open_store().save(2, {"policy": Blob("again")})
    assert not list(directory.glob(".saving-*"))
    assert open_store().restore_latest({"policy": policy}) == 2


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda path: (path / "policy" / "blob.txt").write_text("nwe"), "blob.txt is damaged"),
        (lambda path: (path / "policy" / "blob.txt").write_text("n"), "has 1 bytes, expected 3"),
        (lambda path: (path / "policy" / "blob.txt").unlink(), "blob.txt is missing"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1'), "cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "cannot be read"),
        (lambda path: path.rename(path.with_name("step-00000009")), "another step"),
    ],
    ids=["bit-flip", "truncated", "file-lost", "manifest-cut", "manifest-lost", "renamed"],
)
def test_a_damaged_checkpoint_is_skipped_by_name(open_store, caplog, damage, finding):
    store = open_store()
    store.save(1, {"policy": Blob("old")})
    damage(store.save(2, {"policy": Blob("new")}))
    policy = Blob()
    with caplog.at_level(logging.WARNING):
        assert open_store().restore_latest({"policy": policy}) == 1
    assert policy.content == "old"
    assert finding in caplog.text


def test_nothing_but_damaged_checkpoints_is_an_error_and_no_fresh_start(open_store):
    saved = open_store().save(1, {"policy": Blob("old")})
    (saved / "policy" / "blob.txt").write_text("odl")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is intact"):
        open_store().restore_latest({"policy": Blob()})


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(open_store):
    store = open_store(keep_last=2)
    store.save(1, {"policy": Blob("one")})
    saved = store.save(2, {"policy": Blob("two")})
    (saved / "policy" / "blob.txt").write_text("owt")
    again = open_store(keep_last=2)
    assert again.restore_latest({"policy": Blob()}) == 1
    again.save(2, {"policy": Blob("two")})
    policy = Blob()
    assert open_store().restore_latest({"policy": policy}) == 2
    assert policy.content == "two"


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_kept(open_store, tmp_path):
    store = open_store(keep_last=2)
    store.save(1, {"policy": Blob("one")})
    (store.save(2, {"policy": Blob("two")}) / "manifest.json").unlink()
    again = open_store(keep_last=2)
    assert again.restore_latest({"policy": Blob()}) == 1
    again.save(3, {"policy": Blob("three")})
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000001", "step-00000003"]


def test_a_missing_role_is_an_error_and_never_a_fresh_critic(open_store):
    open_store().save(1, {"policy": Blob("p")})
    with pytest.raises(CheckpointError, match=r"has no critic \(it has policy\)"):
        open_store().restore_latest({"policy": Blob(), "critic": Blob()})


def test_a_role_this_run_does_not_have_is_an_error(open_store):
    open_store().save(1, {"policy": Blob("p"), "critic": Blob("c")})
    with pytest.raises(CheckpointError, match="holds critic, which this run would drop"):
        open_store().restore_latest({"policy": Blob()})


def test_a_role_that_writes_nothing_is_not_committed(open_store):
    class Silent(Blob):
        def save(self, directory: Path) -> None: ...

    store = open_store()
    with pytest.raises(CheckpointError, match="role critic wrote nothing"):
        store.save(1, {"policy": Blob("p"), "critic": Silent()})
    assert store.latest() is None


def test_a_failed_save_commits_nothing_and_the_next_one_works(open_store):
    store = open_store()
    store.save(1, {"policy": Blob("one")})
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*No space left"):
        store.save(2, {"policy": Broken("two")})
    latest = store.latest()
    assert latest is not None
    assert latest.name == "step-00000001"
    store.save(2, {"policy": Blob("two")})
    policy = Blob()
    assert open_store().restore_latest({"policy": policy}) == 2
    assert policy.content == "two"


def test_a_role_that_cannot_load_says_which_checkpoint(open_store):
    class Stubborn(Blob):
        def load(self, directory: Path) -> None:
            raise KeyError("layers.0.weight")

    open_store().save(1, {"policy": Blob("p")})
    with pytest.raises(CheckpointError, match=r"cannot restore checkpoint .*layers.0.weight"):
        open_store().restore_latest({"policy": Stubborn()})


def test_checkpoints_of_another_configuration_are_refused_and_left_alone(open_store, tmp_path):
    open_store(fingerprint="a").save(1, {"policy": Blob("p")})
    before = content_of(tmp_path)
    with pytest.raises(CheckpointError, match="another configuration"):
        open_store(fingerprint="b")
    assert content_of(tmp_path) == before


def test_a_claimed_directory_without_checkpoints_may_change_its_configuration(open_store):
    open_store(fingerprint="a")
    open_store(fingerprint="b").save(1, {"policy": Blob("p")})
    with pytest.raises(CheckpointError, match="another configuration"):
        open_store(fingerprint="a")


def test_a_checkpoint_copied_from_another_configuration_is_refused(open_store):
    saved = open_store().save(1, {"policy": Blob("p")})
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "b"}))
    with pytest.raises(CheckpointError, match="another configuration"):
        open_store().restore_latest({"policy": Blob()})


def test_a_folder_that_is_not_ours_is_left_alone(open_store, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.tex").write_text("five years")
    before = content_of(tmp_path)
    with pytest.raises(CheckpointError, match="was not made by llmac"):
        open_store()
    assert content_of(tmp_path) == before


def test_a_kill_while_claiming_does_not_lock_us_out(open_store, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".llmac.json.saving").write_text('{"form')
    assert open_store().restore_latest({"policy": Blob()}) == 0


def test_a_place_that_cannot_be_written_is_named_before_training(runtime, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot use .*file.checkpoints for checkpoints"):
        CheckpointStore(
            tmp_path / "file" / "checkpoints", keep_last=1, runtime=runtime, fingerprint="a"
        )


def test_saving_behind_a_later_checkpoint_is_refused(open_store):
    open_store().save(5, {"policy": Blob("five")})
    fresh = open_store()
    with pytest.raises(CheckpointError, match="step-00000005 is later than step 3"):
        fresh.save(3, {"policy": Blob("three")})


def test_keeping_no_checkpoint_is_refused(open_store):
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        open_store(keep_last=0)


def draw() -> tuple[float, ...]:
    # The Gaussian ones leave half a pair in the generator: part of the state, too.
    return (
        random.gauss(0, 1),
        random.random(),
        float(numpy.random.standard_normal()),
        float(numpy.random.rand()),
        float(torch.rand(())),
        float(torch.randn(())),
    )


def test_random_numbers_continue_where_they_stopped(runtime, tmp_path):
    state = RandomState(runtime)
    draw()
    state.save(tmp_path)
    expected = draw()
    runtime.seed(99)
    assert draw() != expected
    state.load(tmp_path)
    assert draw() == expected


class Notebook:
    """Remembers one number."""

    def __init__(self, number=0):
        self.number = number

    def state(self):
        return {"number": self.number}

    def restore(self, state):
        self.number = state["number"]


class Rank:
    """One of several processes, as far as files go."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0


def test_what_ranks_remember_apart_comes_back_to_each_and_to_no_other_number_of_them(tmp_path):
    for rank in (0, 1):
        Remembered(Notebook(10 + rank), Rank(rank, 2), alike=False).save(tmp_path)
    for rank in (0, 1):
        again = Notebook()
        Remembered(again, Rank(rank, 2), alike=False).load(tmp_path)
        assert again.number == 10 + rank
    for alone in (Rank(0, 1), Rank(2, 3)):
        with pytest.raises(CheckpointError, match="was written by 2 processes, and here are"):
            Remembered(Notebook(), alone, alike=False).load(tmp_path)


def test_what_all_ranks_remember_alike_comes_back_to_any_number_of_them(tmp_path):
    for rank in (0, 1):
        Remembered(Notebook(7), Rank(rank, 2), alike=True).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    again = Notebook()
    Remembered(again, Rank(2, 3), alike=True).load(tmp_path)
    assert again.number == 7


@pytest.mark.parametrize("forgetful", [(0, 1), (1,)])
def test_who_remembers_nothing_continues_on_any_number_of_ranks(forgetful, tmp_path):
    for rank in (0, 1):
        notebook = Notebook(10 + rank)
        if rank in forgetful:
            notebook.state = dict
        Remembered(notebook, Rank(rank, 2), alike=False).save(tmp_path)
    again = Notebook(3)
    if 0 in forgetful:
        Remembered(again, Rank(2, 3), alike=False).load(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="was written by 2 processes"):
            Remembered(again, Rank(2, 3), alike=False).load(tmp_path)
    Remembered(again, Rank(1, 2), alike=False).load(tmp_path)
    assert again.number == 3
