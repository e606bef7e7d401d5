"""What a run says about itself: measures of all ranks become one line of numbers a step."""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from llmac.core.measures import Max, Mean, Measure, Metrics, combine
from llmac.errors import DataError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

T = TypeVar("T")


class Ranks(Protocol):
    """What is needed of `runtime.context.Runtime`."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        ...

    def gather(self, item: T) -> list[T]:
        """Every rank's object, on every rank."""
        ...

    def track(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand numbers to tensorboard, wandb and the like."""
        ...


class StepDisplay(Protocol):
    """What is needed of `console.Console`."""

    def begin(self, done: int) -> None:
        """Show that training goes on behind step `done`."""
        ...

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show one step's numbers."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class MetricLog:
    """Collects a step's measures and writes one JSON object a line, exact over any number of ranks.

    A line of `metrics.jsonl` is `{"step": 3, "reward/mean": 0.5, ...}`; a step has at most one.
    All names are listed in docs/metrics.md. Two of them are made here, because they need the whole
    step and all ranks:

        timing_s/step    = seconds since the previous `flush`, of the slowest rank
        perf/throughput  = rollout/sampled_tokens / timing_s/step, tokens sampled by all ranks a second

    >>> from tempfile import mkdtemp
    >>> from llmac.core.measures import Mean, Sum
    >>> class OneRank:
    ...     is_main = True
    ...     def gather(self, item): return [item]
    ...     def track(self, metrics, step): pass
    >>> log = MetricLog(Path(mkdtemp()), OneRank())
    >>> log.add({"reward/mean": Mean(6.0, 8.0)})
    >>> log.add({"reward/mean": Mean(0.0, 4.0)}, {"reward/unscored": Sum(1.0)})
    >>> values = log.flush(1)
    >>> values["reward/mean"], values["reward/unscored"]
    (0.5, 1.0)
    """

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        display: StepDisplay | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is written before the first `rewind` or `flush`.

        Args:
            output: run directory; the main rank makes it if need be.
            ranks: the process group, usually a `Runtime`.
            display: shown each step on the main rank; None: nothing is.
            clock: seconds, from any zero.
        """
        self._path = output / METRICS_FILE
        self._ranks = ranks
        self._display = display
        self._clock = clock
        self._since = clock()
        self._pending: dict[str, Measure] = {}
        self._written_up_to: int | None = None
        self._warned: set[str] = set()
        self.latest: dict[str, float] = {}
        """The numbers of the last `flush`; empty before the first."""

    def add(self, *parts: Metrics) -> None:
        """Combine measures into the current step; later parts are later in time.

        Tensors become numbers here, so that no graph or device memory is kept until `flush`.

        Raises:
            TypeError: a name changes its reduction, or a measure is not one number.
        """
        self._pending = combine(self._pending, *(_as_numbers(part) for part in parts))

    def flush(self, step: int) -> dict[str, float]:
        """End a step: reduce over ranks, then write, track and show on the main rank.

        Every rank calls it. One collective, whatever names a rank has: a name that some ranks lack
        is reduced over those that have it, and a mean over nothing is left out. A number that is NaN
        or infinite is written as null, not tracked, and warned of once by name.

        Returns:
            The same numbers on every rank; NaN and infinities as they are.
        """
        now = self._clock()
        mine = combine(self._pending, {"timing_s/step": Max(now - self._since)})
        self._since, self._pending = now, {}
        whole = combine(*self._ranks.gather(mine))
        values = {name: m.value for name, m in whole.items() if not _of_nothing(m)}
        if "rollout/sampled_tokens" in values and values["timing_s/step"] > 0:
            values["perf/throughput"] = values["rollout/sampled_tokens"] / values["timing_s/step"]
        self.latest = values
        if self._ranks.is_main:
            self._write(step, values)
            self._ranks.track({n: v for n, v in values.items() if math.isfinite(v)}, step)
            if self._display is not None:
                self._display.step(step, values)
        return values

    def rewind(self, step: int) -> None:
        """Training goes on from `step`: cut away its line, later ones, and an incomplete last one.

        Also starts the clock of the next step. Every rank may call it; the main rank writes.
        """
        self._since = self._clock()
        if self._ranks.is_main:
            self._cut(step)
            if self._display is not None:
                self._display.begin(step - 1)

    def close(self) -> None:
        """Release the terminal. Safe to call twice."""
        if self._display is not None:
            self._display.close()

    def _cut(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = [line for line in lines if line["step"] < step]
        if self._path.exists():
            aside = self._path.with_suffix(".jsonl.tmp")
            with aside.open("w", encoding="utf-8") as file:
                file.writelines(_as_line(line) for line in kept)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._path)
        self._written_up_to = kept[-1]["step"] if kept else -1

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._written_up_to is None or step <= self._written_up_to:
            self._cut(step)
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "%s is %s at step %d; metrics.jsonl has null there. Said once for each metric.",
                    name,
                    value,
                    step,
                )
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        # Opened for each line: after a crash or a kill every finished step is on disk and whole.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_as_line({"step": step, **numbers}))
        self._written_up_to = step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, also of a run that is still going on or was killed.

    An incomplete last line is left out.

    Raises:
        DataError: another line is not a JSON object with a `step`.
    """
    steps: list[dict[str, Any]] = []
    # Strict utf-8 would stumble over a multi-byte character that a kill has cut.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError("not an object with an integer `step`")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: expected one JSON object with a `step`, "
                f"found {line[:80]!r} ({error}); "
                "remove that line to go on"
            ) from error
        steps.append(values)
    return steps


def _as_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def _as_numbers(metrics: Metrics) -> dict[str, Measure]:
    return {
        name: dataclasses.replace(
            measure,
            **{
                entry.name: _number(
                    name, getattr(measure, entry.name)
                )  # the fields differ by kind of measure
                for entry in dataclasses.fields(measure)
            },
        )
        for name, measure in metrics.items()
    }


def _of_nothing(measure: Measure) -> bool:
    return isinstance(measure, Mean) and float(measure.weight) == 0


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(
                f"metric {name} is one number; found a tensor of shape {tuple(value.shape)}"
            )
        value = value.item()
    return float(value)
