"""When a rank is gone, the others end within seconds and say which one it was. Real processes, killed for real."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import DistBackendError

from llmac.errors import ConfigError, ConsistencyError
from llmac.runtime.links import Link, meet
from llmac.runtime.liveness import EXIT_OTHER_RANK_GONE, Liveness
from tests.runtime.liveness_worker import work

SECONDS = 20
"""Within which every survivor must have ended."""


@pytest.fixture(scope="module")
def processes():
    """Processes that find torch and accelerate already imported, and share nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runtime.liveness_worker"])
    return context


class Ranks:
    """Ranks without a launcher: nobody but they themselves can end them."""

    def __init__(self, processes, folder, world_size, task, patience, grace):
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        self.reports = [folder / f"rank{rank}" for rank in range(world_size)]
        self.all = [
            processes.Process(
                target=work, args=(rank, world_size, port, str(report), task, patience, grace)
            )
            for rank, report in enumerate(self.reports)
        ]
        for process in self.all:
            process.start()
        self.wait_until(lambda: all("ready" in self.said(rank) for rank in range(world_size)))

    def wait_until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, [self.said(rank) for rank in range(len(self.all))]
            time.sleep(0.02)

    def send(self, rank, number):
        os.kill(self.all[rank].pid, number)

    def said(self, rank):
        return self.reports[rank].read_text() if self.reports[rank].exists() else ""

    def end_of(self, rank):
        """(exit code, output) of a rank that must end soon, and its seconds."""
        self.all[rank].join(SECONDS)
        assert self.all[rank].exitcode is not None, f"rank {rank} goes on: {self.said(rank)}"
        return self.all[rank].exitcode, self.said(rank)

    def name(self, rank):
        return f"rank {rank} ({socket.gethostname()}, pid {self.all[rank].pid})"


@pytest.fixture
def start(processes, tmp_path):
    """Starts ranks and leaves none behind."""
    started = []

    def start_ranks(world_size, task, *, patience=60.0, grace=1.0):
        started.append(Ranks(processes, tmp_path, world_size, task, patience, grace))
        return started[-1]

    yield start_ranks
    for ranks in started:
        for process in ranks.all:
            process.kill()
            process.join()


def test_a_collective_whose_partner_is_killed_is_explained(start):
    ranks = start(2, "collective")
    ranks.send(1, signal.SIGKILL)
    code, said = ranks.end_of(0)
    assert code == 1
    assert f"ConsistencyError: {ranks.name(1)} died in phase 'collective'" in said
    assert f"this process, {ranks.name(0)} in phase 'collective', ends" in said


def test_an_error_that_a_broken_collective_caused_is_explained_too(start):
    ranks = start(2, "wrapped")
    ranks.send(1, signal.SIGKILL)
    code, said = ranks.end_of(0)
    assert code == 1
    assert f"ConsistencyError: {ranks.name(1)} died" in said


@pytest.mark.parametrize("task", ["loop", "sleep"])
def test_a_busy_rank_ends_when_another_is_killed(start, task):
    ranks = start(3, task)
    ranks.send(1, signal.SIGKILL)
    for rank in (0, 2):
        code, said = ranks.end_of(rank)
        assert code == EXIT_OTHER_RANK_GONE
        assert f"{ranks.name(1)} died in phase '{task}'" in said
        assert "died" not in said.replace(f"{ranks.name(1)} died", "")


def test_the_death_of_rank_0_is_named_by_all(start):
    ranks = start(3, "sleep")
    ranks.send(0, signal.SIGKILL)
    for rank in (1, 2):
        code, said = ranks.end_of(rank)
        assert code == EXIT_OTHER_RANK_GONE
        assert f"{ranks.name(0)} died in phase 'sleep'" in said


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_as_silent_once_patience_ends(start, stopped):
    ranks = start(3, "sleep", patience=3.0)
    begin = time.monotonic()
    ranks.send(stopped, signal.SIGSTOP)
    for rank in {0, 1, 2} - {stopped}:
        code, said = ranks.end_of(rank)
        assert code == EXIT_OTHER_RANK_GONE
        assert re.search(
            re.escape(ranks.name(stopped)) + r" has been silent for [3-5] s in phase 'sleep'", said
        )
        assert "died" not in said
    assert time.monotonic() - begin > 3.0
    # When it wakes up, it hears that it was given up.
    ranks.send(stopped, signal.SIGCONT)
    code, said = ranks.end_of(stopped)
    assert code == EXIT_OTHER_RANK_GONE


@pytest.mark.slow
def test_ranks_that_stood_still_together_do_not_blame_each_other(start):
    ranks = start(2, "nap", patience=2.5)
    for rank in (0, 1):
        ranks.send(rank, signal.SIGSTOP)
    time.sleep(3.5)
    for rank in (0, 1):
        ranks.send(rank, signal.SIGCONT)
    for rank in (0, 1):
        assert ranks.end_of(rank) == (0, "ready\ndone\n")


@pytest.mark.parametrize("order", ["upwards", "downwards"])
def test_ranks_that_finish_one_after_the_other_are_not_called_dead(start, order):
    ranks = start(3, order)
    for rank in range(3):
        assert ranks.end_of(rank) == (0, "ready\ndone\n")


def test_the_reason_of_a_rank_that_fails_is_heard_by_all(start):
    ranks = start(3, "reward")
    reason = "RewardError: exact_match returned None for prompt p7"
    for rank in (0, 2):
        code, said = ranks.end_of(rank)
        assert code == EXIT_OTHER_RANK_GONE
        assert f"{ranks.name(1)} failed in phase 'reward' with {reason}" in said
    code, said = ranks.end_of(1)
    assert (code, said) == (1, f"ready\n{reason}\n")


def test_a_child_that_outlives_its_rank_does_not_hide_its_death(start):
    ranks = start(2, "forked")
    ranks.wait_until(lambda: all(re.search(r"child \d+\.", ranks.said(rank)) for rank in (0, 1)))
    try:
        ranks.send(1, signal.SIGKILL)
        code, said = ranks.end_of(0)
    finally:
        for rank in (0, 1):
            os.kill(int(re.search(r"child (\d+)\.", ranks.said(rank))[1]), signal.SIGKILL)
    assert code == EXIT_OTHER_RANK_GONE
    assert f"{ranks.name(1)} died in phase 'forked'" in said


@pytest.mark.slow
def test_the_message_is_out_before_a_launcher_ends_the_others(tmp_path):
    program = tmp_path / "killed.py"
    program.write_text(
        "import os, signal, time\n"
        "from llmac.runtime.context import Runtime\n"
        "from llmac.runtime.liveness import Liveness\n"
        "runtime = Runtime.create(seed=0, output=None)\n"
        "Liveness.start(runtime)\n"
        "if runtime.rank == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(100)\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(program)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert re.search(r"rank 1 \(.*, pid \d+\) died.*; this process, rank 0 .* ends", result.stderr)


class Alone:
    """A process group of one."""

    rank = 0
    world_size = 1

    def broadcast(self, item):
        return item

    def gather(self, item):
        return [item]


def test_one_process_has_nobody_to_watch():
    liveness = Liveness.start(Alone())
    with pytest.raises(KeyError), liveness.reporting():
        raise KeyError("its own affair")
    liveness.close()
    liveness.close()


class Two(Alone):
    """Rank 0 of two; the other is in a process that this one cannot see."""

    world_size = 2

    def gather(self, item):
        return [item, ("elsewhere", 7)]


@pytest.fixture
def watching():
    """(rank 0's Liveness, rank 1's end of their connection)"""
    mine, theirs = socket.socketpair()
    liveness = Liveness(Two(), {1: Link(1, mine)}, patience=60.0, grace=1.0)
    yield liveness, theirs
    liveness.close()
    theirs.close()


def test_a_rank_goes_on_beating_with_the_phase_it_is_in(watching):
    liveness, theirs = watching
    liveness.doing("gen")
    theirs.settimeout(10)
    heard = []
    while len(heard) < 3:  # one at once, two as time passes
        heard += [json.loads(line)["phase"] for line in theirs.recv(1000).splitlines()]
    assert heard == ["gen", "gen", "gen"]


def test_a_failed_collective_waits_a_moment_for_its_reason(watching):
    liveness, theirs = watching
    threading.Timer(0.3, theirs.close).start()
    with (
        pytest.raises(ConsistencyError, match=r"^rank 1 \(elsewhere, pid 7\) died"),
        liveness.reporting(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_a_failed_collective_without_a_reason_is_this_ranks_own_failure(watching):
    liveness, theirs = watching
    with pytest.raises(DistBackendError, match="NCCL error"), liveness.reporting():
        raise DistBackendError("NCCL error: unhandled system error")
    assert b"failed with DistBackendError: NCCL error: unhandled" in theirs.recv(1000)


def test_a_ranks_own_failure_is_not_blamed_on_one_that_fails_as_well(watching):
    liveness, theirs = watching
    theirs.sendall(b'{"kind": "farewell", "text": "failed with ConfigError: no such model"}\n')
    with pytest.raises(ConfigError, match="no such model"), liveness.reporting():
        raise ConfigError("no such model")


@pytest.mark.parametrize("wrong", [{"patience_seconds": 0.0}, {"grace_seconds": -1.0}])
def test_no_patience_is_refused(wrong):
    with pytest.raises(ValueError, match="must be > 0"):
        Liveness.start(Alone(), **wrong)


class Pair:
    """The process group of two, in two threads of this process."""

    def __init__(self, rank, box, together):
        self.rank, self.world_size, self._box, self._together = rank, 2, box, together

    def broadcast(self, item):
        if self.rank == 0:
            self._box.append(item)
        self._together.wait()
        return self._box[0]


def test_strangers_at_the_door_are_turned_away(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    box, together, links = [], threading.Barrier(3), {}

    def join(rank):
        links[rank] = meet(Pair(rank, box, together))

    host = threading.Thread(target=join, args=(0,))
    host.start()
    while not box:
        time.sleep(0.01)
    port, token = box[0]
    strangers = [socket.create_connection(("localhost", port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost:1234\r\n\r\n")
    strangers[1].sendall(token + b"\0\0\0\7")
    strangers[2].close()
    guest = threading.Thread(target=join, args=(1,))
    guest.start()
    together.wait()
    for thread in (host, guest):
        thread.join(20)
    links[1][0].send(b"hello")
    links[0][1].socket.setblocking(True)
    assert links[0][1].socket.recv(5) == b"hello"
    assert links[0].keys() == {1}
    for stranger in strangers[:2]:
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
    for end in (*strangers, links[0][1].socket, links[1][0].socket):
        end.close()


def test_a_rank_that_cannot_reach_rank_0_says_where_it_knocked(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConsistencyError, match=f"rank 1 cannot reach rank 0 at localhost:{port}"):
        meet(Pair(1, [(port, b"")], threading.Barrier(1)))
