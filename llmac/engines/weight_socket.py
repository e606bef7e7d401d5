"""Buckets of weights over TCP: the trainer listens, whoever loads weights connects and reads one bucket a connection.

    reader -> owner    nonce, bucket, HMAC(secret, "ask", nonce, bucket)
    owner -> reader    bytes to come, HMAC(secret, "answer", nonce, bytes to come), the bytes

The secret itself does not travel here. Without it nobody can read weights, nor feed any to a server; the bytes are not
encrypted, so the network has to be one you trust.
"""

import hmac
import secrets
import socket
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from llmac.errors import EngineError

STALL_SECONDS = 60.0
"""Longest time in which not a byte moves, before a connection counts as broken."""
CHUNK = 4 << 20
HELLO = 0
"""A bucket of no bytes, always there: asking for it shows whether the owner can be reached."""

_ASK = struct.Struct("!16sQ32s")
_ANSWER = struct.Struct("!Q32s")


class WeightSocket:
    """The owner's side: memory for each slot, and a socket from which it is read."""

    def __init__(self, host: str) -> None:
        """Listen on a free port.

        Args:
            host: address of this machine that readers can reach; nobody is listened to on others.

        Raises:
            EngineError: this machine has no such address.
        """
        self._secret = secrets.token_bytes(32)
        self._memory: dict[int, Tensor] = {}
        self._offered: dict[int, Tensor] = {HELLO: torch.empty(0, dtype=torch.uint8)}
        self._keys: dict[int, int] = {}
        self._last_key = HELLO
        try:
            self._listener = socket.create_server((host, 0), family=_family(host))
        except OSError as error:
            raise EngineError(
                f"cannot offer weights at {host}: {error}; expected an address of this machine that the servers reach"
            ) from error
        self._address = host, self._listener.getsockname()[1]
        threading.Thread(target=self._listen, name="weights", daemon=True).start()

    def introduction(self) -> dict[str, Any]:
        """What a reader needs once. Whoever knows it can read the weights."""
        host, port = self._address
        return {"host": host, "port": port, "secret": self._secret.hex()}

    def room(self, slot: int, size: int) -> Tensor:
        """Memory of `size` bytes for the slot, to be written; it is not offered any more."""
        self._offered.pop(self._keys.pop(slot, -1), None)
        if slot not in self._memory or self._memory[slot].numel() < size:
            self._memory[slot] = torch.empty(size, dtype=torch.uint8)
        return self._memory[slot][:size]

    def where(self, slot: int) -> dict[str, Any]:
        """Offer the memory of the slot as it is now, under a new key."""
        self._last_key += 1
        self._keys[slot] = self._last_key
        self._offered[self._last_key] = self._memory[slot]
        return {"key": self._last_key}

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        # Closing alone would not wake the thread that waits in `accept`.
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._memory.clear()
        self._offered.clear()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """One bucket for one reader; who cannot prove that it knows the secret is hung up on."""
        with connection:
            connection.settimeout(STALL_SECONDS)
            try:
                asked = torch.empty(_ASK.size, dtype=torch.uint8)
                _receive(connection, asked)
                nonce, key, proof = _ASK.unpack(asked.numpy().tobytes())
                if not hmac.compare_digest(proof, _proof(self._secret, b"ask", nonce, key)):
                    return
                memory = self._offered.get(key)
                if memory is None:
                    return
                content = memory.numpy().data
                signed = _proof(self._secret, b"answer", nonce, len(content))
                connection.sendall(_ANSWER.pack(len(content), signed))
                for start in range(0, len(content), CHUNK):
                    connection.sendall(content[start : start + CHUNK])
            except OSError:  # the reader has gone; it is the one who reports
                return


class WeightSocketReader:
    """The other side: reads buckets into one buffer that is kept."""

    def __init__(self, introduction: dict[str, Any], stall_seconds: float = STALL_SECONDS) -> None:
        """See whether the owner answers.

        Raises:
            EngineError: it does not.
        """
        self._address = introduction["host"], introduction["port"]
        self._secret = bytes.fromhex(introduction["secret"])
        self._stall_seconds = stall_seconds
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.read({"key": HELLO}, 0)

    def read(self, where: dict[str, Any], size: int) -> Tensor:
        """The first `size` bytes of a bucket; valid until the next call.

        Raises:
            EngineError: the trainer does not answer, is not the trainer, or sends less than it should.
        """
        host, port = self._address
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        try:
            with socket.create_connection(self._address, timeout=self._stall_seconds) as connection:
                self._ask(connection, where["key"], size)
                _receive(connection, self._buffer[:size])
        except OSError as error:
            raise EngineError(
                f"reading weights from the trainer at {host}:{port} failed: {type(error).__name__}: {error}. The "
                "trainer has ended or offers other weights now, or its port cannot be reached from here"
            ) from error
        return self._buffer[:size]

    def close(self) -> None:
        """Free the buffer. Safe to call twice."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _ask(self, connection: socket.socket, key: int, size: int) -> None:
        nonce = secrets.token_bytes(16)
        connection.sendall(_ASK.pack(nonce, key, _proof(self._secret, b"ask", nonce, key)))
        answer = torch.empty(_ANSWER.size, dtype=torch.uint8)
        _receive(connection, answer)
        offered, proof = _ANSWER.unpack(answer.numpy().tobytes())
        if not hmac.compare_digest(proof, _proof(self._secret, b"answer", nonce, offered)):
            raise ConnectionError(
                "the answer is not from the trainer this server was introduced to"
            )
        if offered < size:
            raise ConnectionError(f"{offered} bytes are offered; the bucket needs {size}")


def host_towards(address: str) -> str:
    """The address of this machine that a machine at `address` would see.

    Raises:
        EngineError: `address` is unknown or no way leads there.

    >>> host_towards("127.0.0.1")
    '127.0.0.1'
    """
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # of datagrams, nothing is sent by connecting
            return probe.getsockname()[0]
    except OSError as error:
        raise EngineError(f"no way to {address}: {error}; correct rollout.servers") from error


def _proof(secret: bytes, word: bytes, nonce: bytes, number: int) -> bytes:
    return hmac.digest(secret, word + nonce + struct.pack("!Q", number), "sha256")


def _receive(connection: socket.socket, into: Tensor) -> None:
    """Fill the tensor; raises `ConnectionError` when the other side ends before."""
    left = into.numpy().data
    while left:
        count = connection.recv_into(left)
        if count == 0:
            raise ConnectionError(f"closed with {len(left)} of {into.numel()} bytes missing")
        left = left[count:]


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
