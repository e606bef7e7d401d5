"""One update of the weights of several servers at once, as the rank that feeds them sees it.

    pause, label `incomplete` -> end what broke off -> start -> bucket, bucket, ... -> finish under a label
        -> empty prefix cache -> resume

A server on which a step fails stays paused and labelled `incomplete`: it may hold half of an update, and what somebody
makes it sample all the same is recognised by its label.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import httpx
from torch import Tensor

from llmac.engines.server_protocol import decoded, message_of, tls
from llmac.engines.weight_sender import BREAK_OFF

CONNECT_SECONDS = 10.0
INCOMPLETE = "incomplete"


class Sender(Protocol):
    """Puts weights where servers can fetch them. Implementation: `vllm_transfer.WeightSender`."""

    @property
    def backend(self) -> str:
        """The weight transfer backend a server must have been started with."""
        ...

    def init_info(self) -> dict[str, Any]:
        """What a server must know once, after each of its starts."""
        ...

    def buckets(
        self, stream: Iterable[tuple[str, Tensor]]
    ) -> Generator[dict[str, Any], None, None]:
        """The stream, bucket by bucket: what to tell all servers so that they fetch it.

        A bucket can be fetched until the next but one is asked for, so that gathering overlaps with loading.
        """
        ...

    def close(self) -> None:
        """Free what was shared. Safe to call twice."""
        ...


class SessionError(Exception):
    """A server did not do its part of an update."""


class WeightSession:
    """Feeds servers through a `Sender`. Lives as long as the engine; `send` is one update."""

    def __init__(self, sender: Sender, *, timeout_seconds: float) -> None:
        """Nothing is sent yet; a server takes part after `admit`.

        Args:
            sender: owned from now on.
            timeout_seconds: longest wait for one step on one server.
        """
        self._sender = sender
        timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        # The server closes a connection after it answered with an error, and the next request would run into that.
        anew = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(timeout=timeout, limits=anew, verify=tls(), trust_env=False)

    def admit(self, url: str) -> None:
        """Introduce the sender to a server that has just started, or that another run fed before.

        Raises:
            SessionError: the server refuses or is not there.
        """
        self._post(url, "/init_weight_transfer_engine", {"init_info": self._sender.init_info()})

    def send(
        self, urls: Sequence[str], weights: Iterable[tuple[str, Tensor]], label: str
    ) -> dict[str, str]:
        """Update all servers to the weights under the label, all at the same time.

        Returns:
            Why not, for each server that has not got them all; the update goes on for the others. When none is left,
            the rest of the stream is not read.
        """
        lost: dict[str, str] = {}
        with (
            # Closed last, when no server reads any more; and always, so that the sender gets its buffers back.
            contextlib.closing(self._sender.buckets(weights)) as buckets,
            ThreadPoolExecutor(max_workers=max(1, len(urls))) as threads,
        ):

            def everywhere(step: Callable[[str], None]) -> dict[str, Future[None]]:
                return {url: threads.submit(step, url) for url in urls if url not in lost}

            under_way = everywhere(self._open)
            for bucket in buckets:
                lost |= _failures(under_way)
                if len(lost) == len(urls):
                    return lost
                under_way = everywhere(partial(self._update, bucket=bucket))
            lost |= _failures(under_way)
            lost |= _failures(everywhere(partial(self._finish, label=label)))
        return lost

    def close(self) -> None:
        """Close connections and the sender. Safe to call twice."""
        self._client.close()
        self._sender.close()

    def _open(self, url: str) -> None:
        self._post(url, "/pause?mode=abort")
        self._post(url, "/update_weight_version", {"new_version": INCOMPLETE})
        # Always: a start that is refused, because an update broke off, costs a server of several workers a restart.
        self._post(url, "/collective_rpc", {"method": BREAK_OFF})
        self._post(url, "/start_weight_update")

    def _update(self, url: str, bucket: Mapping[str, Any]) -> None:
        self._post(url, "/update_weights", {"update_info": bucket})

    def _finish(self, url: str, label: str) -> None:
        self._post(url, "/finish_weight_update", {"weight_version": label})
        if not self._post(url, "/reset_prefix_cache").get("success"):
            raise SessionError(
                "the prefix cache was not emptied: it would mix keys of the old weights with the new ones"
            )
        self._post(url, "/resume")

    def _post(self, url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            response = self._client.post(url + path, json=body)
        except httpx.TransportError as error:
            raise SessionError(f"{path}: {type(error).__name__}: {error}") from error
        answer = decoded(response)
        if response.status_code != 200:
            raise SessionError(f"{path}: HTTP {response.status_code}: {message_of(answer)}")
        return answer


def _failures(steps: Mapping[str, Future[None]]) -> dict[str, str]:
    """Wait for all; why not, for each server whose step failed."""
    failures: dict[str, str] = {}
    for url, step in steps.items():
        try:
            step.result()
        except SessionError as error:
            failures[url] = str(error)
    return failures
