"""The picture of an examination: calibration, error by depth, ranking by depth."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmac.core.calibration import Estimate
from llmac.critics.examine import Report
from llmac.critics.states import States

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#1f6fb2", "#c2571a", "#2b8a57", "#666666"


def plot_calibration(report: Report, states: States, output: Path, *, title: str) -> Path:
    """Draw a report.

    Args:
        report: of one critic.
        states: it was asked about.
        output: picture to write; the suffix decides the format (.png, .svg, .pdf).
        title: above the picture.

    Returns:
        `output`.
    """
    figure = calibration_figure(report, states, title=title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160, facecolor="white")
    return output


def calibration_figure(report: Report, states: States, *, title: str) -> "Figure":
    """The figure of `plot_calibration`."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(12.6, 3.8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    calibration, error, ranking = figure.subplots(1, 3)
    _calibration(calibration, report, states)
    depths = sorted(set(states.depth.tolist()))
    _lines(
        error,
        depths,
        {
            "RMSE without noise": (BLUE, _scores(report, "rmse_corrected")),
            "bias": (ORANGE, _scores(report, "bias")),
        },
        title="Error by depth",
        level=0.0,
    )
    _lines(
        ranking,
        depths,
        {
            "explained variance": (GREEN, _scores(report, "explained_variance")),
            "AUC": (BLUE, _scores(report, "auc")),
            "AUC within prompts": (ORANGE, _scores(report, "auc_within_prompts")),
        },
        title="Explained variance and ranking by depth",
        level=0.5,
    )
    # A critic far below a constant must not flatten the rest.
    ranking.set_ylim(bottom=max(-1.05, ranking.get_ylim()[0]), top=1.05)
    return figure


def _calibration(axes: "Axes", report: Report, states: States) -> None:
    truth = states.value.tolist()
    ends = [min(*truth, *report.values), max(*truth, *report.values)]
    axes.plot(ends, ends, color="#999999", linewidth=0.8)
    axes.scatter(report.values, truth, s=9, color=BLUE, alpha=0.25, linewidths=0)
    at = [b.value for b in report.curve]
    means = [b.truth for b in report.curve]
    _with_intervals(axes, at, means, BLUE, None)
    ece = report.overall.scores["ece"].value
    _dress(axes, f"Calibration (ECE {ece:.2f})", "value")
    axes.set_ylabel("Monte-Carlo value", color="#555555")


def _lines(
    axes: "Axes",
    depths: Sequence[float],
    lines: dict[str, tuple[str, list[Estimate]]],
    *,
    title: str,
    level: float,
) -> None:
    axes.axhline(level, color="#999999", linewidth=0.8)
    for name, (colour, estimates) in lines.items():
        _with_intervals(axes, depths, estimates, colour, name)
    _dress(axes, title, "depth, fraction of the response")
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY)


def _with_intervals(
    axes: "Axes", at: Sequence[float], estimates: Sequence[Estimate], colour: str, name: str | None
) -> None:
    known = [(x, e) for x, e in zip(at, estimates, strict=True) if not math.isnan(e.value)]
    places = [x for x, _ in known]
    axes.plot(
        places, [e.value for _, e in known], color=colour, marker="o", markersize=4.5, label=name
    )
    for x, e in known:
        if not math.isnan(e.low):
            axes.plot([x, x], [e.low, e.high], color=colour, linewidth=1.0, alpha=0.6)


def _scores(report: Report, name: str) -> list[Estimate]:
    return [judgement.scores[name] for judgement in report.by_depth]


def _dress(axes: "Axes", title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color="#333333")
    axes.set_xlabel(label, color="#555555")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelcolor="#555555", labelsize=9)
