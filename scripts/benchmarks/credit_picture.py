"""The picture of `credit.py`: accuracy against sampled tokens and against seconds, a row for each task."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[Mapping[str, float]]
"""Points of one run."""
COLOURS = {
    "GRPO": "#333333",
    "PPO": "#999999",
    "VinePPO": "#2b8a57",
    "SPO-chain": "#c2571a",
    "SPO-tree": "#1f6fb2",
    "TEMPO": "#8a4fbf",
}
AXES = {
    "tokens": ("sampled tokens, millions", 1e6),
    "cpu_seconds": ("CPU seconds of training", 1.0),
}
POINTS = 60


def draw(tasks: Mapping[str, Mapping[str, Sequence[Curve]]], output: Path) -> None:
    """Means over seeds, and around them their standard error.

    Args:
        tasks: curves by task and setting; a task without any gets no row.
        output: picture to write.
    """
    from matplotlib.figure import Figure

    tasks = {name: runs for name, runs in tasks.items() if runs}
    if not tasks:
        return
    figure = Figure(figsize=(10.5, 3.9 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(AXES), squeeze=False)
    for row, (name, runs) in zip(panels, tasks.items(), strict=True):
        span = shown_range([curve for curves in runs.values() for curve in curves])
        for axes, (key, (label, unit)) in zip(row, AXES.items(), strict=True):
            _panel(axes, runs, key, unit)
            axes.set_ylim(*span)
            axes.set_title(f"{name}: held-out accuracy", loc="left", fontsize=10, color="#333333")
            axes.set_xlabel(label, color="#555555")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    figure.savefig(output, dpi=160, facecolor="white")


def _panel(axes: "Axes", runs: Mapping[str, Sequence[Curve]], key: str, unit: float) -> None:
    for setting, curves in runs.items():
        at, mean, error = average(curves, key)
        xs = [x / unit for x in at]
        axes.plot(xs, mean, color=COLOURS[setting], linewidth=1.8, label=setting)
        low = [m - e for m, e in zip(mean, error, strict=True)]
        high = [m + e for m, e in zip(mean, error, strict=True)]
        axes.fill_between(xs, low, high, color=COLOURS[setting], alpha=0.15, linewidth=0)
    axes.set_xlim(left=0.0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelcolor="#555555", labelsize=9)


def shown_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Accuracies of the picture: those from the first evaluation after the start on; of the rise to it, the end.

    >>> start, then, last = ({"accuracy": a} for a in (0.1, 0.5, 0.9))
    >>> shown_range([[start, then, last]])
    (0.45, 0.95)
    """
    later = [point["accuracy"] for curve in curves for point in curve[1:]]
    return round(max(0.0, min(later) - 0.05), 2), round(min(1.0, max(later) + 0.05), 2)


def average(curves: Sequence[Curve], key: str) -> tuple[list[float], list[float], list[float]]:
    """Places as far as all runs go, the mean accuracy there, and its standard error (0 of a single run)."""
    last = min(curve[-1][key] for curve in curves)
    at = [last * i / POINTS for i in range(POINTS + 1)]
    values = [[between(curve, key, x) for curve in curves] for x in at]
    mean = [statistics.fmean(v) for v in values]
    error = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in values]
    return at, mean, error


def between(curve: Curve, key: str, x: float) -> float:
    """Accuracy at `x` on the straight line between evaluations.

    >>> between([{"tokens": 0, "accuracy": 0.2}, {"tokens": 10, "accuracy": 0.6}], "tokens", 2.5)
    0.3
    """
    for a, b in itertools.pairwise(curve):
        if x <= b[key]:
            way = (x - a[key]) / (b[key] - a[key])
            return round(a["accuracy"] + way * (b["accuracy"] - a["accuracy"]), 12)
    return curve[-1]["accuracy"]
