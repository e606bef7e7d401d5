"""What an examination found, for programs (JSON) and for people (tables)."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llmac.core.calibration import Estimate
from llmac.critics.examine import MEASURES, Judgement, Report
from llmac.critics.states import States

SHOWN_BY_DEPTH = (
    "rmse_corrected",
    "bias",
    "explained_variance",
    "ece",
    "auc",
    "auc_within_prompts",
)
"""Columns of the table by depth; the JSON has all."""


def as_dict(report: Report, states: States, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as `critic_eval.json` holds it; what is undefined is null.

    Args:
        report: of one critic.
        states: it was asked about.
        about: which critic, which policy, how sampled; JSON.
    """
    columns = zip(
        states.row.tolist(),
        states.position.tolist(),
        states.depth.tolist(),
        report.values,
        states.value.tolist(),
        states.standard_error.tolist(),
        states.succeeded.tolist(),
        strict=True,
    )
    return {
        "about": dict(about),
        "measures": {name: measured.meaning for name, measured in MEASURES.items()},
        "confidence": report.confidence,
        "noise": report.noise,
        "overall": _judgement(report.overall),
        "by_depth": [_judgement(judgement) for judgement in report.by_depth],
        "by_outcome": [_judgement(judgement) for judgement in report.by_outcome],
        "calibration": [
            {"states": b.states, "value": b.value, "truth": _estimate(b.truth)}
            for b in report.curve
        ],
        "states": [
            {
                "prompt": states.trajectories[row].prompt.id,
                "response": row,
                "position": position,
                "depth": round(depth, 6),
                "value": value,
                "truth": truth,
                "standard_error": error,
                "succeeded": succeeded,
            }
            for row, position, depth, value, truth, error, succeeded in columns
        ],
    }


def tables(report: Report, about: Mapping[str, Any]) -> Group:
    """The numbers for a terminal: all states, then by depth and by outcome."""
    return Group(
        Text(_heading(report, about)), _overall(report), Text(), _by_part(report), Text(_notes())
    )


def _heading(report: Report, about: Mapping[str, Any]) -> str:
    whole = report.overall
    return (
        f"{about['critic']}, run {about['run']} ({about['moment']}), on {about['prompts']}\n"
        f"{whole.states} states of {whole.prompts} prompts, {about['rollouts']} continuations each; "
        f"mean value {_number(whole.mean_value)}, true {_number(whole.mean_truth)}\n"
    )


def _overall(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("all states", "value", f"{report.confidence:.0%} interval", "best"):
        table.add_column(name, justify="left" if name == "all states" else "right")
    table.add_column("meaning")
    for name, measured in MEASURES.items():
        estimate = report.overall.scores[name]
        interval = f"{_number(estimate.low)} to {_number(estimate.high)}"
        table.add_row(
            name,
            _number(estimate.value),
            "-" if math.isnan(estimate.low) else interval,
            _number(report.noise if name == "rmse" else report.overall.best[name]),
            measured.meaning,
        )
    return table


def _by_part(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("states")
    for name in ("n", "value", "true"):
        table.add_column(name, justify="right")
    for name in SHOWN_BY_DEPTH:
        table.add_column(name.replace("_", " "), justify="right")
    for judgement in (*report.by_depth, *report.by_outcome):
        table.add_row(
            judgement.where,
            str(judgement.states),
            _number(judgement.mean_value),
            _number(judgement.mean_truth),
            *(_with_half_width(judgement.scores[name]) for name in SHOWN_BY_DEPTH),
        )
    return table


def _notes() -> str:
    return (
        "\nbest: what exact values would score; rmse: what the noise of the truth alone makes of them.\n"
        "±: half the interval. failed, successful: by the end of the response, which no critic can know."
    )


def _with_half_width(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return _number(estimate.value)
    return f"{_number(estimate.value)} ±{(estimate.high - estimate.low) / 2:.2f}"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3f}".replace("-0.000", "0.000")


def _judgement(judgement: Judgement) -> dict[str, Any]:
    return {
        "where": judgement.where,
        "states": judgement.states,
        "prompts": judgement.prompts,
        "mean_value": judgement.mean_value,
        "mean_truth": judgement.mean_truth,
        "scores": {name: _estimate(e) for name, e in judgement.scores.items()},
        "best": {name: _or_none(x) for name, x in judgement.best.items()},
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {
        "value": _or_none(estimate.value),
        "low": _or_none(estimate.low),
        "high": _or_none(estimate.high),
    }


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else x
