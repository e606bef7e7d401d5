"""Every rank knows within seconds that another one is gone, and says which."""

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from torch.distributed import DistError

from llmac.errors import ConsistencyError, LlmacError, StalledError
from llmac.runtime.links import Link, Ranks, meet

logger = logging.getLogger(__name__)

EXIT_OTHER_RANK_GONE = 121
"""Exit code of a process that ended because another rank died, failed or fell silent."""
LEAVING_SECONDS = 60.0
"""How long a process that was told, and has begun to clean up, may take for it."""
LONGEST_BEAT_SECONDS = 1.0


class Liveness:
    """Ends this process, with a message that names the rank, when another rank is gone.

    A collective whose partner has died waits for hours (NCCL), or fails with "Connection closed by
    peer" and no name (gloo). So every rank keeps one connection to rank 0, on which a thread sends
    a beat with the phase it is in, and listens. Rank 0 tells all others what it learns.

        what happened            how it is known                          after
        process ended, kill -9   its kernel closes the connection         at once
        an exception             it says so itself (`reporting`)          at once
        host or network gone     its kernel acknowledges nothing          `HOST_TIMEOUT_SECONDS`
        stopped, or stuck in C   no beat                                  `patience_seconds`
        normal end               it says so itself (`close`)              nobody minds

    C code that holds Python's lock cannot beat, so patience must exceed the longest such call; a
    closed connection needs no patience. A rank that merely waits goes on beating: that nothing
    moves is for `Phases` to find. Who learns of the end of another logs it, leaves the main thread
    `grace_seconds` to fail by itself and clean up, and ends the process with `EXIT_OTHER_RANK_GONE`
    if it does not: a thread inside a collective does not hear exceptions.

    In one process there is nobody to watch, and everything here does nothing.

    >>> from llmac.runtime.context import Runtime
    >>> runtime = Runtime.create(seed=0, output=None)
    >>> liveness = Liveness.start(runtime)
    >>> with liveness.reporting():
    ...     liveness.doing("gen")
    >>> runtime.close()
    >>> liveness.close()
    """

    def __init__(
        self, ranks: Ranks, links: dict[int, Link], *, patience: float, grace: float
    ) -> None:
        """Watch over `links`; `start` makes them."""
        self._phase = ""
        self._rank = ranks.rank
        self._names = {
            rank: f"rank {rank} ({host}, pid {pid})"
            for rank, (host, pid) in enumerate(ranks.gather((socket.gethostname(), os.getpid())))
        }
        self._links = links
        self._patience = patience
        self._grace = grace
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, patience / 5)
        self._sending = threading.Lock()
        self._told = threading.Event()
        self._leaving = threading.Event()
        self._closed = threading.Event()
        self._finding: tuple[str, bool] | None = None
        self._error: LlmacError | None = None
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for link in links.values():
            link.socket.setblocking(False)
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        _open.add(self)
        self._thread.start()

    @classmethod
    def start(
        cls, ranks: Ranks, *, patience_seconds: float = 300.0, grace_seconds: float = 5.0
    ) -> "Liveness":
        """Connect all ranks; called by all of them at the same place.

        Args:
            ranks: the process group.
            patience_seconds: how long a rank may be silent. Longer than any call into C code that
                holds Python's lock, such as compiling or loading a large model.
            grace_seconds: how long the main thread may take to notice by itself.

        Raises:
            ValueError: patience or grace is not positive.
            ConsistencyError: the ranks cannot reach rank 0.
        """
        if not (patience_seconds > 0 and grace_seconds > 0):
            raise ValueError(
                "patience_seconds and grace_seconds must be > 0; "
                f"found {patience_seconds} and {grace_seconds}"
            )
        links = meet(ranks) if ranks.world_size > 1 else {}
        return cls(ranks, links, patience=patience_seconds, grace=grace_seconds)

    def doing(self, phase: str) -> None:
        """This rank is now in `phase`; the others will say so if it never leaves it."""
        self._phase = phase
        self._say(kind="beat", phase=phase)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Around all the work: what it raises is told to the other ranks, or explained by theirs.

        Raises:
            ConsistencyError, StalledError: instead of an error of communication that followed from
                the end of another rank, which is named.
        """
        try:
            yield
        except BaseException as error:
            if len(self._names) > 1 and _is_of_communication(error):
                # The rank at fault may be heard of a moment later than its closed connections.
                self._told.wait(self._grace)
                if self._error is not None:
                    self._leave()
                    raise self._error from error
            self.farewell(f"{type(error).__name__}: {error}")
            raise

    def farewell(self, reason: str) -> None:
        """Tell the others why this rank ends before it is done. Only the first word counts."""
        if not self._leaving.is_set():
            self._leave()
            self._say(kind="farewell", text=f"failed{_in(self._phase)} with {reason}")

    def close(self) -> None:
        """Say goodbye, unless there was a farewell, and stop watching. Safe to call twice.

        After the last barrier of the ranks: without rank 0 nobody is watched any more.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        if not self._leaving.is_set():
            self._leave()
            self._say(kind="goodbye")
        self._thread.join(timeout=10.0)
        self._forget()

    def _leave(self) -> None:
        """The main thread is on its way out: stop judging others, and do not end it too early.

        Before the last word: who hears that one closes the connection.
        """
        self._leaving.set()
        with contextlib.suppress(OSError):  # closed already
            self._wake.send(b".")

    def _forget(self) -> None:
        """Give back what the operating system keeps for the connections, in this process only."""
        self._selector.close()
        for end in (self._wake, self._woken, *(link.socket for link in self._links.values())):
            end.close()
        _open.discard(self)

    # From here on: the thread.

    def _watch(self) -> None:
        last_look = next_beat = time.monotonic()
        while self._links:
            events = self._selector.select(timeout=self._beat_seconds)
            if self._leaving.is_set():
                return
            for key, _ in events:
                if isinstance(key.data, Link):
                    self._listen(key.data)
            now = time.monotonic()
            if now - last_look > self._patience / 2:
                # This process stood still itself (a laptop that slept), so it is no judge of silence.
                for link in self._links.values():
                    link.heard = now
            last_look = now
            if now >= next_beat:
                self._say(kind="beat", phase=self._phase)
                next_beat = now + self._beat_seconds
            self._judge(now)
            if self._finding is not None:
                self._end(*self._finding)
                return

    def _listen(self, link: Link) -> None:
        try:
            received = link.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionResetError:  # it ended before it read all that it was told
            received = b""
        except OSError as error:
            self._lost(link, "cannot be reached any more", str(error))
            return
        if not received:
            self._lost(link, "died", "its connection closed without a word")
            return
        link.heard = time.monotonic()
        *lines, link.incoming = (link.incoming + received).split(b"\n")
        for line in lines:
            self._hear(link, json.loads(line))

    def _hear(self, link: Link, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "beat", "phase": phase}:
                link.phase = phase
            case {"kind": "goodbye"}:
                self._drop(link)
            case {"kind": "farewell", "text": text}:
                self._find(f"{self._names[link.rank]} {text}")
            case {"kind": "finding", "text": text, "silent": silent}:
                self._find(text, silent=silent)

    def _judge(self, now: float) -> None:
        for link in self._links.values():
            silence = now - link.heard
            if silence > self._patience:
                self._find(
                    f"{self._names[link.rank]} has been silent for {silence:.0f} s"
                    f"{_in(link.phase)} (patience_seconds is {self._patience:g})",
                    silent=True,
                )

    def _lost(self, link: Link, what: str, evidence: str) -> None:
        self._drop(link)
        self._find(f"{self._names[link.rank]} {what}{_in(link.phase)}: {evidence}")

    def _find(self, text: str, *, silent: bool = False) -> None:
        if self._finding is None:
            self._finding = text, silent

    def _drop(self, link: Link) -> None:
        if self._links.pop(link.rank, None) is not None:
            self._selector.unregister(link.socket)
            link.socket.close()

    def _end(self, text: str, silent: bool) -> None:
        self._say(kind="finding", text=text, silent=silent)
        me = f"{self._names[self._rank]}{_in(self._phase)}"
        kind = StalledError if silent else ConsistencyError
        self._error = kind(f"{text.rstrip('.')}; this process, {me}, ends")
        # In a thread of its own: the main one may hold a lock of the logging system for ever. At
        # once: a launcher that sees a dead child ends the others a moment later.
        report = threading.Thread(target=logger.error, args=("%s", self._error), daemon=True)
        report.start()
        report.join(timeout=2.0)
        self._told.set()
        if not (self._leaving.wait(self._grace) and self._closed.wait(LEAVING_SECONDS)):
            os._exit(EXIT_OTHER_RANK_GONE)

    def _say(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for link in list(self._links.values()):
                link.send(line)


def _is_of_communication(error: BaseException | None) -> bool:
    """Whether a failed collective is at the bottom of it. gloo has no class of its own for that."""
    while error is not None:
        said = str(error)
        gloo = type(error) is RuntimeError and ("gloo" in said or "closed by peer" in said)
        if gloo or isinstance(error, DistError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _in(phase: str) -> str:
    return f" in phase '{phase}'" if phase else ""


_open: weakref.WeakSet[Liveness] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child that outlives its parent would keep the parent's connections open, and nobody
    # would see it die.
    for liveness in list(_open):
        liveness._leaving.set()
        liveness._closed.set()
        liveness._forget()


os.register_at_fork(after_in_child=_forget_in_child)
