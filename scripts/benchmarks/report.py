"""The arithmetic of a benchmark, and its tables. Standard library only."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Cell = str | float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One table: what was measured, under which conditions, and what follows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    raw: Mapping[str, object] = field(default_factory=dict)
    """Single measurements, for --json only."""


def settled(seconds: Sequence[float], *, warm_up: int, last: int = 0) -> list[float]:
    """Without the first `warm_up` and the last `last` steps."""
    kept = list(seconds[warm_up : len(seconds) - last])
    if not kept:
        raise ValueError(f"{len(seconds)} steps leave none after {warm_up} + {last} are dropped")
    return kept


def rate(amount: float, seconds: Sequence[float]) -> float:
    """Amount per step / median seconds of a step: one disturbed step does not count."""
    return amount / statistics.median(seconds)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of ours / theirs over rounds; both of a round ran one after the other, so drifts of the machine cancel."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def shares(seconds: Mapping[str, float], *, total: float) -> dict[str, float]:
    """Each phase's part of `total`, and the rest."""
    parts = {phase: value / total for phase, value in seconds.items()}
    return {**parts, "everything else": 1 - sum(parts.values())}


def shown(cell: Cell) -> str:
    """Three significant digits, thousands with a comma; None is a dash."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"


def as_text(report: Report) -> str:
    """A Markdown table, aligned so that it also reads in a terminal."""
    rows = [list(report.columns), *([shown(cell) for cell in row] for row in report.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(report.columns))]
    left = [all(isinstance(row[i], str) for row in report.rows) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, left, strict=True)
        return f"| {' | '.join(c.ljust(w) if at else c.rjust(w) for c, w, at in cells)} |"

    rule = "|".join(
        "-" * (w + 1) + ("-" if at else ":") for w, at in zip(widths, left, strict=True)
    )
    lines = [report.title, "", line(rows[0]), f"|{rule}|", *map(line, rows[1:]), "", *report.notes]
    return "\n".join(lines) + "\n"


def as_json(surroundings: str, reports: Sequence[Report]) -> dict[str, object]:
    """Everything, for machines."""
    return {
        "surroundings": surroundings,
        "reports": [
            {
                "title": r.title,
                "rows": [dict(zip(r.columns, row, strict=True)) for row in r.rows],
                "notes": list(r.notes),
                "raw": dict(r.raw),
            }
            for r in reports
        ],
    }
