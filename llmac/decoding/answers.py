"""What a response votes for: its answer, found in its text."""

import re
from collections.abc import Callable, Hashable

from llmac.errors import ConfigError
from llmac.rewards.loader import resolve

WAYS = ("auto", "boxed", "equals")
_BOX = "\\boxed{"


def answer_finder(how: str) -> Callable[[str], Hashable | None]:
    r"""A function from a response's text to its answer, None where it has none.

    Args:
        how: `boxed`; `equals`, what follows the last `=`; `auto`, boxed if there is a box, else behind `=`;
            `regex:PATTERN`, the last match, its first group if it has one; `path/to/file.py:function` or
            `package.module:function`.

    Raises:
        ConfigError: none of these, or a pattern that is not one.

    >>> answer_finder("auto")("3+4=7;7-2=5"), answer_finder("boxed")(r"so \boxed{\frac{1}{2}}.")
    ('5', '\\frac{1}{2}')
    >>> answer_finder(r"regex:answer is (\d+)")("the answer is 12, no, the answer is 13")
    '13'
    """
    if how == "boxed":
        return boxed
    if how == "equals":
        return behind_equals
    if how == "auto":
        return lambda text: boxed(text) or behind_equals(text)
    if how.startswith("regex:"):
        return _by_pattern(how.removeprefix("regex:"))
    if ":" not in how:
        raise ConfigError(
            f"--answer {how!r} is not a way to find answers; there are {', '.join(WAYS)}, regex:PATTERN, and "
            "path/to/file.py:function"
        )
    found = resolve(how)
    if not callable(found):
        raise ConfigError(
            f"--answer {how} is a {type(found).__name__}; expected a function of text"
        )
    return found


def behind_equals(text: str) -> str | None:
    """What follows the last `=`; None without one, or where nothing follows."""
    _, equals, rest = text.rpartition("=")
    return rest.strip() or None if equals else None


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{}, braces balanced; None without one, or where it is never closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 0
    for place in range(start + len(_BOX) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(_BOX) : place].strip() or None
    return None


def _by_pattern(pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--answer regex:{pattern} is not a pattern: {error}") from error

    def find(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        if not matches:
            return None
        return matches[-1].group(1 if compiled.groups else 0)

    return find
