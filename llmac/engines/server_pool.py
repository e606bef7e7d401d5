"""Requests over several servers: the least loaded one is asked, and what one does not answer is asked of another.

A server that gives no answer is doubted: nothing new goes to it until it has answered a look at its health with the
weights it should hold. One that this run started is dead if it does not answer at once (it will be started anew); one
that somebody else runs is waited for as long as for a response. One that was too slow for a response is dead: it hangs.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from llmac.engines.server_protocol import GENERATE, Interrupted, decoded, message_of, tls
from llmac.errors import EngineError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 4
"""Times a request is asked of servers that turn out to be well, before its failure counts as its own."""
LOOK_SECONDS = 10.0
"""Longest wait for a look at a server's health."""
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(slots=True, kw_only=True)
class Server:
    """A server as this rank sees it."""

    url: str
    """Without a slash at the end."""
    local: bool
    """This run started it, and starts it anew."""
    living: bool = True
    """Requests may go to it."""
    why: str = ""
    """What it was last doubted for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Generic[T]):
    """One request, and how to read its answer."""

    body: Mapping[str, Any]
    responses: int
    tokens: int
    """Most it may take, prompt and responses: its weight in balancing."""
    read: Callable[[Any, str], T]
    """(decoded JSON, url) -> the answer. Raises `Interrupted` to have the request asked again."""


class Pool:
    """Asks jobs of those of `servers` that live, and writes what it learns into `servers`."""

    def __init__(
        self, servers: Sequence[Server], *, first: int, room: int, timeout_seconds: float
    ) -> None:
        """Nothing is asked yet.

        Args:
            servers: shared with the caller.
            first: place of the server that this rank prefers among equally loaded ones, so that ranks spread.
            room: responses this rank has a server work at or queue; more wait here, for whoever is free first.
            timeout_seconds: longest wait for an answer.
        """
        self._servers = [servers[(first + place) % len(servers)] for place in range(len(servers))]
        self._room = room
        self._timeout_seconds = timeout_seconds

    def ask(self, jobs: Sequence[Job[T]], *, label: str) -> tuple[list[T | None], int]:
        """The answers in the order of the jobs; None where no server lives any more.

        Args:
            jobs: what to ask.
            label: of the weights a doubted server must hold to be asked again.

        Returns:
            The answers, and how many times a job had to be asked again.

        Raises:
            EngineError: a job was refused, failed too often, or its answer is not to be used. The others are given up.
        """
        return _run(self._ask(jobs, label))

    async def _ask(self, jobs: Sequence[Job[T]], label: str) -> tuple[list[T | None], int]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # An answer may take long, a connection may not; the whole is timed in `_post`.
        timeout = httpx.Timeout(None, connect=LOOK_SECONDS)
        async with httpx.AsyncClient(
            timeout=timeout, limits=limits, verify=tls(), trust_env=False
        ) as client:
            asking = _Asking(
                client, self._servers, room=self._room, seconds=self._timeout_seconds, label=label
            )
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(asking.answer(job)) for job in jobs]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                await asking.finish_looking()
        return [task.result() for task in tasks], asking.repeated


class _Asking:
    """The state of one `Pool.ask`."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        servers: Sequence[Server],
        *,
        room: int,
        seconds: float,
        label: str,
    ) -> None:
        self.repeated = 0
        self._client = client
        self._servers = servers
        self._room = room
        self._seconds = seconds
        self._label = label
        self._responses = {server.url: 0 for server in servers}
        self._tokens = {server.url: 0 for server in servers}
        self._changed = asyncio.Condition()
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._lost: set[str] = set()
        self._finishing = False

    async def answer(self, job: Job[T]) -> T | None:
        """The answer of the first server that gives one; None when none is left."""
        failure = ""
        for _ in range(ATTEMPTS + len(self._servers)):
            server = await self._claim(job)
            if server is None:
                return None
            try:
                return job.read(await self._post(server, job.body), server.url)
            except TimeoutError:
                failure = f"no answer within {self._seconds:g} s"
                self._lose(server, failure)
            except (httpx.TransportError, Interrupted) as error:
                failure = _described(error)
                self._doubt(server, failure)
            finally:
                await self._release(server, job)
            self.repeated += 1
            failure = f"{server.url}: {failure}"
        raise EngineError(
            f"a request failed {ATTEMPTS + len(self._servers)} times on servers that are otherwise well, the last time "
            f"on {failure}. Its log has the cause"
        )

    async def finish_looking(self) -> None:
        """End the looks at doubted servers with the one under way."""
        self._finishing = True
        await asyncio.gather(*self._looks.values())

    async def _claim(self, job: Job[Any]) -> Server | None:
        """The living server with the least to do, once one has room for the job; None when no server is left."""
        async with self._changed:
            while True:
                living = [server for server in self._servers if server.living]
                if not living and all(look.done() for look in self._looks.values()):
                    return None
                # One job always fits, however large it is.
                free = [
                    server
                    for server in living
                    if not (held := self._responses[server.url])
                    or held + job.responses <= self._room
                ]
                if free:
                    server = min(free, key=lambda server: self._tokens[server.url])
                    self._responses[server.url] += job.responses
                    self._tokens[server.url] += job.tokens
                    return server
                await self._changed.wait()

    async def _release(self, server: Server, job: Job[Any]) -> None:
        self._responses[server.url] -= job.responses
        self._tokens[server.url] -= job.tokens
        await self._notify()

    async def _post(self, server: Server, body: Mapping[str, Any]) -> Any:
        """The decoded answer."""
        async with asyncio.timeout(self._seconds):
            response = await self._client.post(server.url + GENERATE, json=body)
        answer = decoded(response)
        if response.status_code >= 500:
            raise Interrupted(f"HTTP {response.status_code}: {message_of(answer)}")
        if response.status_code != 200:
            raise EngineError(
                f"{server.url} refused a request with HTTP {response.status_code}: {message_of(answer)}"
            )
        return answer

    def _lose(self, server: Server, why: str) -> None:
        server.living, server.why = False, why
        self._lost.add(server.url)
        logger.warning("%s is left out until the next update: %s", server.url, why)

    def _doubt(self, server: Server, why: str) -> None:
        """Ask nothing more of the server until a look has shown that it is well."""
        if server.living:
            server.living, server.why = False, why
            self._looks[server.url] = asyncio.create_task(self._look_after(server))

    async def _look_after(self, server: Server) -> None:
        """Let the server live again as soon as it is well, if that is soon enough and it was not lost meanwhile."""
        deadline = time.monotonic() + (0.0 if server.local else self._seconds)
        while (problem := await self._problem(server)) is not None and server.url not in self._lost:
            if time.monotonic() >= deadline or self._finishing:
                self._lose(server, f"{server.why}, then {problem}")
                break
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        server.living = problem is None and server.url not in self._lost
        self._looks.pop(server.url)
        await self._notify()

    async def _problem(self, server: Server) -> str | None:
        """Why the server cannot be asked; None if it can."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                response = await self._client.get(server.url + "/weight_info")
            found = response.raise_for_status().json()["weight_version"]
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError) as error:
            return _described(error)
        return None if found == self._label else f"holds weights labelled {found!r}"

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _described(error: BaseException) -> str:
    """The error in a few words; most of httpx's have a text, some only a name."""
    if isinstance(error, Interrupted):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in a thread of its own where a loop is already running (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
