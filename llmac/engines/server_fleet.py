"""The servers as rank 0 keeps them: started, introduced to the sender of weights, fed, and started anew."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from llmac.engines.server_facts import (
    ServerFacts,
    check_alike,
    check_first_token,
    health_problem,
    wait_until_healthy,
)
from llmac.engines.server_session import Sender, SessionError, WeightSession
from llmac.errors import EngineError

logger = logging.getLogger(__name__)


class LocalServer(Protocol):
    """A server process on this machine. Implementation: `vllm_launch.ServerProcess`."""

    @property
    def url(self) -> str:
        """Where it listens, the same after each start; no slash at the end."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it runs; it may still be starting, or hang."""
        ...

    def start(self) -> None:
        """Start it and return at once."""
        ...

    def wait_ready(self, seconds: float) -> None:
        """Return when it is healthy; raises `EngineError` with the end of its log when it dies or is late."""
        ...

    def restart(self) -> None:
        """End it, also when it hangs, start it again and return at once."""
        ...

    def close(self) -> None:
        """End it. Safe to call twice."""
        ...


class Fleet:
    """Starts, feeds and restarts servers. Raises nothing about a single server once `start` has succeeded."""

    def __init__(
        self,
        urls: Sequence[str],
        processes: Sequence[LocalServer],
        sender: Sender,
        *,
        timeout_seconds: float,
        start_seconds: float,
    ) -> None:
        """Nothing runs yet.

        Args:
            urls: servers that somebody else runs.
            processes: servers this run starts; owned from now on.
            sender: of weights; owned from now on.
            timeout_seconds: longest wait for one step of an update, and for somebody else's server.
            start_seconds: longest wait for a local server to start.
        """
        self.restarts = 0
        self._processes = {process.url: process for process in processes}
        self._urls = [*urls, *self._processes]
        self._sender = sender
        self._session = WeightSession(sender, timeout_seconds=timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._start_seconds = start_seconds
        self._restarted: dict[str, float] = {}

    def start(self, *, model: str, last_token: int) -> dict[str, ServerFacts]:
        """Start local servers, wait for all, and see that all are what this run needs; facts by URL.

        Args:
            model: the checkpoint that is trained.
            last_token: the largest token id of its vocabulary.

        Raises:
            EngineError: one is not there or not as it should be; the message names it.
        """
        for process in self._processes.values():
            process.start()
        for url in self._urls:
            self._wait(url, patient=True)
        facts = {url: ServerFacts.of(url) for url in self._urls}
        check_alike(facts, model=model, backend=self._sender.backend)
        for url in self._urls:
            check_first_token(url, last_token)
            try:
                self._session.admit(url)
            except SessionError as error:
                raise EngineError(f"the server at {url} cannot be sent weights: {error}") from error
        return facts

    def is_local(self, url: str) -> bool:
        """Whether this run started the server."""
        return url in self._processes

    def lose(self, urls: Iterable[str]) -> None:
        """Those of them that are local start anew; returns at once."""
        for url in urls:
            if url in self._processes:
                self._start_anew(url)

    def bring_back(self, urls: Sequence[str], *, patient: bool) -> dict[str, str]:
        """Take lost servers in again; why not, for each that is not back.

        Args:
            urls: the lost ones.
            patient: wait for local servers until they have started, and for somebody else's as long as for a response;
                otherwise one look must do, and who is still starting is left in peace until the next.
        """
        problems: dict[str, str] = {}
        for url in urls:
            if not patient and self._is_starting(url):
                problems[url] = "still starting"
                continue
            try:
                self._wait(url, patient=patient)
                self._session.admit(url)
            except (EngineError, SessionError) as error:
                problems[url] = str(error)
                self.lose([url])  # once more, for the update after this one
        return problems

    def send(
        self, urls: Sequence[str], weights: Iterable[tuple[str, Tensor]], label: str
    ) -> Mapping[str, str]:
        """One update of the servers; why not, for each that has not got all of it."""
        return self._session.send(urls, weights, label)

    def close(self) -> None:
        """End local servers and free what was shared. Safe to call twice."""
        for process in self._processes.values():
            process.close()
        self._session.close()

    def _start_anew(self, url: str) -> None:
        logger.warning("the server at %s is started anew", url)
        self.restarts += 1
        self._restarted[url] = time.monotonic()
        try:
            self._processes[url].restart()
        except (
            EngineError
        ) as error:  # found out by all ranks when it is not back at the next update
            logger.warning("%s", error)

    def _is_starting(self, url: str) -> bool:
        """Whether it is a local server that needs more time to start, and has it."""
        if url not in self._processes or not self._processes[url].alive:
            return False
        seconds = time.monotonic() - self._restarted[url]
        return seconds < self._start_seconds and health_problem(url) is not None

    def _wait(self, url: str, *, patient: bool) -> None:
        if url in self._processes:
            self._processes[url].wait_ready(self._start_seconds if patient else 0.0)
        else:
            wait_until_healthy(url, self._timeout_seconds if patient else 0.0)
