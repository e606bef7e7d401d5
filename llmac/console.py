"""Live progress of a run: a bar in a terminal, one line a step elsewhere, in the same words."""

import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from typing import TextIO

import rich.console
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

RECENT_STEPS = 20
"""Steps over which the time left is estimated."""


class Console:
    """Shows each step's reward, response length, KL, speed, time left and held-out accuracy.

        step 12/80 | reward 0.512 | length 41.2 | KL to reference 0.0021 | tokens/s 10,450 | ...

    Only the main rank has one. Text from outside (prompts, paths, reward functions) is printed as
    it is: nothing in it is taken for markup or for a terminal command.
    """

    def __init__(
        self, total_steps: int, *, file: TextIO | None = None, live: bool | None = None
    ) -> None:
        """Nothing is shown before the first call.

        Args:
            total_steps: number of the last step.
            file: where to; None: standard output.
            live: draw a bar; None: if `file` is a terminal that can.
        """
        stream = sys.stdout if file is None else file
        if live is None:
            live = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
        self._total = total_steps
        self._rich = rich.console.Console(file=stream, force_terminal=live)
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._words: dict[str, str] = {}
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps)
        self._live = (
            Live(console=self._rich, get_renderable=self._picture, refresh_per_second=4)
            if live
            else None
        )

    def begin(self, done: int) -> None:
        """Draw the bar of a run that has `done` steps behind it; lines need no beginning."""
        if self._live is not None:
            self._bar.update(self._task, completed=done)
            self._live.start(refresh=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show one step.

        Numbers that the step lacks are left out of its line; the bar keeps the last known.
        """
        if "timing_s/step" in values and step > 0:
            self._seconds.append(values["timing_s/step"])
        words = summary(values)
        if self._seconds and step < self._total:
            left = (self._total - step) * sum(self._seconds) / len(self._seconds)
            words["time left"] = duration(left)
        if self._live is None:
            parts = [
                f"step {step}/{self._total}",
                *(f"{name} {value}" for name, value in words.items()),
            ]
            self.line(" | ".join(parts))
            return
        self._words = {**{k: v for k, v in self._words.items() if k != "time left"}, **words}
        self.begin(step)

    def line(self, text: str) -> None:
        """Print a message, above the bar if there is one."""
        self._rich.print(Text(printable(text)), soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back. Safe to call twice."""
        if self._live is not None:
            self._live.stop()

    def _picture(self) -> RenderableType:
        parts = [Text.assemble((f"{name} ", "dim"), value) for name, value in self._words.items()]
        return Group(self._bar, Columns(parts, padding=(0, 3)))


class ConsoleHandler(logging.Handler):
    """Prints log messages through a `Console`, so that they do not tear the bar."""

    def __init__(self, console: Console) -> None:
        """Print to `console`."""
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._console.line(self.format(record))


def show_log_records(console: Console) -> None:
    """Let log messages that go straight to the terminal go through the console, above its bar.

    Handlers that write elsewhere (files, a test's capture) are left alone.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream in (
            sys.stdout,
            sys.stderr,
        ):
            through = ConsoleHandler(console)
            through.setLevel(handler.level)
            through.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(through)


def summary(values: Mapping[str, float]) -> dict[str, str]:
    """The numbers worth a glance, in words: what is shown of a step, without the time left.

    >>> summary({"reward/mean": 0.5, "response_length/mean": 41.25, "perf/throughput": 10450.3})
    {'reward': '0.500', 'length': '41.2', 'tokens/s': '10,450'}
    """
    reference = "actor/ref_kl" in values
    shown = [
        ("reward", "reward/mean", ".3f"),
        ("length", "response_length/mean", ".1f"),
        ("KL to reference", "actor/ref_kl", ".2g")
        if reference
        else ("KL to old policy", "actor/ppo_kl", ".2g"),
        ("value EV", "critic/vf_explained_var", ".2f"),
        ("tokens/s", "perf/throughput", ",.0f"),
        ("held-out accuracy", _first(values, "eval/", "/pass@1"), ".3f"),
    ]
    return {word: format(values[name], how) for word, name, how in shown if name in values}


def duration(seconds: float) -> str:
    """A time span in the two units that matter.

    >>> duration(7.4), duration(125), duration(3725)
    ('7s', '2m 05s', '1h 02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def printable(text: str) -> str:
    r"""The text with control characters spelled out.

    A sampled escape sequence must not drive the terminal.

    >>> printable("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _first(values: Mapping[str, float], start: str, end: str) -> str:
    """The first name of that form; the form itself, which is nobody's name, if there is none."""
    fitting = (name for name in values if name.startswith(start) and name.endswith(end))
    return next(fitting, f"{start}*{end}")
