"""One event loop, in a background thread, for all async reward functions of a run.

A fresh loop every step would break clients that users create once and keep (HTTP sessions belong to the loop they
were first used in), and a loop in the calling thread would fail wherever one is already running (notebooks).
"""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from typing import Any


class BackgroundLoop:
    """Runs awaitables concurrently in a thread of its own, started at first use."""

    def __init__(self) -> None:
        """No thread yet."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: weakref.finalize | None = None

    def start(self, awaitables: Sequence[Awaitable[Any]]) -> "Future[list[Any]]":
        """Run all concurrently; the future holds their results in order, an exception in the place of a result."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="async-rewards", daemon=True)
            thread.start()
            self._loop, self._stop = loop, weakref.finalize(self, _end, loop, thread)
        return asyncio.run_coroutine_threadsafe(_gather(awaitables), self._loop)

    def close(self) -> None:
        """Stop the thread. Safe to call twice."""
        if self._stop is not None:
            self._stop()
            self._loop = self._stop = None


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5.0)
    if not loop.is_running():
        loop.close()
