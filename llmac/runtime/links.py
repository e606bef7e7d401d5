"""Connections of all ranks to rank 0, apart from the process group: they live while a collective hangs."""

import contextlib
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from llmac.errors import ConsistencyError

T = TypeVar("T")

MEETING_SECONDS = 60.0
"""How long rank 0 waits for the others' connections."""
HOST_TIMEOUT_SECONDS = 60
"""A host whose kernel answers nothing for this long is gone: power, cable or network."""

_HELLO = struct.Struct("!32sI")
_UNSENT_LIMIT = 1 << 16


class Ranks(Protocol):
    """What is needed of a `Runtime`."""

    rank: int
    world_size: int

    def broadcast(self, item: T) -> T:
        """Rank 0's object on every rank."""
        ...

    def gather(self, item: T) -> list[T]:
        """Every rank's object on every rank."""
        ...


@dataclass(slots=True, eq=False)
class Link:
    """A connection to another rank. Never waits: what does not fit now goes with the next word."""

    rank: int
    socket: socket.socket
    heard: float = field(default_factory=time.monotonic)
    phase: str = ""
    incoming: bytes = b""
    unsent: bytes = b""

    def send(self, line: bytes) -> None:
        """Send a line, or as much of it as the kernel takes."""
        if len(self.unsent) < _UNSENT_LIMIT:
            self.unsent += line
        # An error is the reader's to find: a dead partner's last words may still be unread.
        with contextlib.suppress(OSError):
            self.unsent = self.unsent[self.socket.send(self.unsent) :]


def meet(ranks: Ranks) -> dict[int, Link]:
    """Rank 0's connections to all others; on the others, the one to rank 0.

    Rank 0 listens on a port that the system chooses, and tells it to the others through the process
    group together with a token that keeps strangers out.

    Raises:
        ConsistencyError: a rank cannot reach rank 0, or does not come.
    """
    if ranks.rank:
        port, token = ranks.broadcast((0, b""))
        link = _reach(os.environ.get("MASTER_ADDR", "localhost"), port, token, ranks.rank)
        return {0: link}
    dual = socket.has_dualstack_ipv6()
    with socket.create_server(
        ("", 0),
        family=socket.AF_INET6 if dual else socket.AF_INET,
        dualstack_ipv6=dual,
        backlog=512,
    ) as door:
        token = secrets.token_hex(16).encode()
        ranks.broadcast((door.getsockname()[1], token))
        return _welcome(door, token, set(range(1, ranks.world_size)))


def _reach(host: str, port: int, token: bytes, rank: int) -> Link:
    try:
        connection = socket.create_connection((host, port), timeout=MEETING_SECONDS)
        connection.sendall(_HELLO.pack(token, rank))
    except OSError as error:
        raise ConsistencyError(
            f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}); ranks watch each other over TCP: "
            "MASTER_ADDR must name rank 0's host on every host, and no firewall may stand between them"
        ) from error
    return Link(0, _notices_a_dead_host(connection))


def _welcome(door: socket.socket, token: bytes, missing: set[int]) -> dict[int, Link]:
    links: dict[int, Link] = {}
    deadline = time.monotonic() + MEETING_SECONDS
    while missing:
        door.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = door.accept()
        except TimeoutError as error:
            raise ConsistencyError(
                f"ranks {sorted(missing)} did not connect to rank 0 within {MEETING_SECONDS:.0f} s; ranks watch each "
                "other over TCP: look at their output, at MASTER_ADDR and at firewalls"
            ) from error
        word, rank = _hello(connection)
        # Anybody may knock; only ranks know the token.
        if not secrets.compare_digest(word, token) or rank not in missing:
            connection.close()
            continue
        links[rank] = Link(rank, _notices_a_dead_host(connection))
        missing.remove(rank)
    return links


def _hello(connection: socket.socket) -> tuple[bytes, int]:
    """Token and rank of who knocks; no token of ours when it says anything else, or too little."""
    connection.settimeout(1.0)
    heard = b""
    with contextlib.suppress(OSError):
        while len(heard) < _HELLO.size and (more := connection.recv(_HELLO.size - len(heard))):
            heard += more
    return _HELLO.unpack(heard) if len(heard) == _HELLO.size else (b"", -1)


def _notices_a_dead_host(connection: socket.socket) -> socket.socket:
    """Let the kernel ask the other kernel, which answers also when Python is busy."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = HOST_TIMEOUT_SECONDS // 3
    # Named as on Linux; elsewhere the system's own, slower keep-alive is what there is.
    for option, value in (
        ("TCP_KEEPIDLE", third),
        ("TCP_KEEPINTVL", third // 2),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 1000 * HOST_TIMEOUT_SECONDS),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection
