"""What each phase of a step costs, and which one hangs."""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from llmac.core.measures import Max, Measure
from llmac.errors import StalledError

logger = logging.getLogger(__name__)

EXIT_STALLED = 124
"""Exit code of a process that its watchdog ended; the one `timeout` uses."""


class Phases:
    """Times named phases of a step, and ends the process when one of them stops moving.

    A hung collective or reward function looks like work from outside. When a phase is open and
    nothing moved for `watchdog_seconds` - no phase began or ended, nobody called `alive` - the
    watchdog logs rank, phase, seconds and the main thread's stack, and ends the process with
    `EXIT_STALLED`; the launcher then ends the other ranks. Ended, not interrupted: a thread inside
    a collective does not hear exceptions.

    Phases may nest; each is timed in full, and the innermost is the one that is named.

    >>> phases = Phases(rank=0, watchdog_seconds=60)
    >>> with phases("gen"):
    ...     pass
    >>> list(phases.drain())
    ['timing_s/gen']
    >>> phases.close()
    """

    def __init__(self, rank: int, watchdog_seconds: float) -> None:
        """Nothing is watched before the first phase.

        Args:
            rank: named when this process stalls.
            watchdog_seconds: longest time without a sign of life inside a phase; 0 = no watchdog.

        Raises:
            ValueError: a negative limit.
        """
        if watchdog_seconds < 0:
            raise ValueError(
                f"watchdog_seconds must be >= 0 (0 = no watchdog), got {watchdog_seconds}"
            )
        self._rank = rank
        self._limit = watchdog_seconds
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._last_sign = time.monotonic()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.announce: Callable[[str], None] = lambda phase: None
        """Told the innermost phase whenever it changes, "" for none; an error keeps the phase it came from."""
        self.last_words: Callable[[str], None] = lambda reason: None
        """Told why, before the watchdog ends the process."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what happens inside as phase `name`; the same name again in a step adds up."""
        start = time.monotonic()
        self._open.append(name)
        self._sign()
        self._start_watching()
        self.announce(name)
        try:
            yield
        finally:
            self._open.pop()
            self._sign()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start
        self.announce(self._open[-1] if self._open else "")

    def alive(self) -> None:
        """A sign of life from inside a long phase: the watchdog's clock starts again."""
        self._sign()

    def drain(self) -> dict[str, Measure]:
        """Seconds of each finished phase since the last drain, of the slowest rank."""
        seconds, self._seconds = self._seconds, {}
        return {f"timing_s/{name}": Max(spent) for name, spent in seconds.items()}

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _sign(self) -> None:
        with self._changed:
            self._last_sign = time.monotonic()
            self._changed.notify()

    def _start_watching(self) -> None:
        if self._thread is None and self._limit > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                silent = time.monotonic() - self._last_sign
                if not self._open:
                    self._changed.wait()
                elif silent < self._limit:
                    self._changed.wait(self._limit - silent)
                else:
                    self._end(self._open[-1], silent)

    def _end(self, phase: str, silent: float) -> None:
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(main)) if main else "  (no stack)\n"
        error = StalledError(
            f"rank {self._rank}: nothing moved in phase '{phase}' for {silent:.0f} seconds "
            f"(run.watchdog_seconds is {self._limit:g}); the process ends. "
            "If the phase only takes long, raise the limit. The main thread stands here:\n" + stack
        )
        # In a thread of its own: the one that stalled may hold a lock of the logging system.
        report = threading.Thread(target=self._report, args=(error,), daemon=True)
        report.start()
        report.join(timeout=5.0)
        os._exit(EXIT_STALLED)

    def _report(self, error: StalledError) -> None:
        logger.error("%s", error)
        self.last_words(str(error).partition("The main thread stands here")[0])
