"""The picture of a run: reward, held-out accuracy and explained variance over steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmac.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[list[int], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One panel of the picture."""

    title: str
    points: Points
    """Steps and values."""
    colour: str
    smooth: bool
    """Draw a running mean, and the values themselves faintly behind it."""
    between: tuple[float, float] | None
    """Range that is always shown; None: where the values are."""


def plot_learning_curve(metrics_path: Path, output: Path, *, title: str) -> Path:
    """Draw a run's reward, held-out accuracy and, with a critic, its explained variance.

    Works on the file of a run that is still going on; what the file lacks gets no panel.

    Args:
        metrics_path: `metrics.jsonl` of the run.
        output: picture to write; the suffix decides the format (.png, .svg, .pdf).
        title: above the picture.

    Returns:
        `output`.

    Raises:
        DataError: a line of the file, other than an incomplete last one, is not a step.
    """
    figure = learning_curve(read_metrics(metrics_path), title=title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160, facecolor="white")
    return output


def learning_curve(steps: Sequence[dict[str, Any]], *, title: str) -> "Figure":
    """The figure of `plot_learning_curve`, from the lines of a `metrics.jsonl`."""
    from matplotlib.figure import (
        Figure,
    )  # without pyplot: no window, no global state, nothing to close

    curves = _curves(steps)
    figure = Figure(figsize=(4.2 * max(1, len(curves)), 3.4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=False):
        _draw(axes, curve)
    if not curves:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no finished step yet", ha="center", va="center", color="#666666")
    return figure


def _curves(steps: Sequence[dict[str, Any]]) -> list[Curve]:
    held_out = next(
        (
            name
            for line in steps
            for name in line
            if name.startswith("eval/") and name.endswith("/pass@1")
        ),
        None,
    )
    rewards = _points(steps, "reward/mean")
    unit = (0.0, 1.0)
    in_unit = bool(rewards[1]) and min(rewards[1]) >= 0 and max(rewards[1]) <= 1
    explained = _points(steps, "critic/vf_explained_var")
    curves = [
        Curve(
            title="Reward, training prompts",
            points=rewards,
            colour="#1f6fb2",
            smooth=True,
            between=unit if in_unit else None,
        ),
        Curve(
            title="Accuracy, held-out prompts",
            points=_points(steps, held_out) if held_out else ([], []),
            colour="#c2571a",
            smooth=False,
            between=unit,
        ),
        Curve(
            title="Explained variance of the critic",
            points=explained,
            colour="#2b8a57",
            smooth=True,
            # The first steps of a critic may lie far below; they must not flatten the rest.
            between=(max(-1.0, min([0.0, *explained[1]])), 1.0),
        ),
    ]
    return [curve for curve in curves if curve.points[0]]


def _points(steps: Sequence[dict[str, Any]], name: str) -> Points:
    known = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw(axes: "Axes", curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    at, values = curve.points
    if curve.smooth and len(values) > 4:
        axes.plot(at, values, color=curve.colour, linewidth=0.9, alpha=0.3)
        values = running_mean(values, half_width=max(1, len(values) // 40))
        axes.plot(at, values, color=curve.colour, linewidth=2.0)
    else:
        axes.plot(at, values, color=curve.colour, linewidth=2.0, marker="o", markersize=4.5)
    low, high = curve.between or (values[-1], values[-1])
    axes.annotate(
        f"{values[-1]:.2f}",
        (at[-1], min(max(values[-1], low), high)),  # not far outside, where it would take the room
        textcoords="offset points",
        xytext=(6, 0),
        va="center",
        color=curve.colour,
        fontweight="bold",
        annotation_clip=False,
    )
    axes.set_title(curve.title, loc="left", fontsize=10, color="#333333")
    axes.set_xlabel("step", color="#555555")
    if curve.between:
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        if low < 0 < high:
            axes.axhline(0.0, color="#999999", linewidth=0.8)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelcolor="#555555", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def running_mean(values: Sequence[float], *, half_width: int) -> list[float]:
    """Mean of each value and up to `half_width` neighbours on either side; fewer at the ends.

    >>> running_mean([0.0, 3.0, 6.0], half_width=1)
    [1.5, 3.0, 4.5]
    """
    windows = [values[max(0, i - half_width) : i + half_width + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]
