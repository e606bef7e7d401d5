"""Tables that a command writes into a page."""

from collections.abc import Sequence
from pathlib import Path

from jobs import JobError
from report import Report, as_text


def check_marks(page: Path, marks: tuple[str, str]) -> None:
    """Before hours of measuring: the page has the place that the tables go to.

    Raises:
        JobError: the page lacks a mark.
    """
    text, (begin, end) = page.read_text(), marks
    if begin not in text or end not in text:
        raise JobError(f"{page} lacks the lines `{begin}` and `{end}`")


def write_between(page: Path, marks: tuple[str, str], reports: Sequence[Report]) -> None:
    """Replace what is between the two marks of the page by the reports.

    Raises:
        JobError: the page lacks a mark.
    """
    check_marks(page, marks)
    text, (begin, end) = page.read_text(), marks
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    tables = "\n".join(as_text(report) for report in reports)
    page.write_text(f"{before}{begin}\n\n{tables}\n{end}{after}")
