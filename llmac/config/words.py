"""Types, values and near misses in words: every message about a recipe speaks one language."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

_KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def describe(hint: Any, constraints: Iterable[object] = ()) -> str:
    """What a field takes, as a person would say it.

    >>> describe(float | None, [annotated_types.Gt(0)])
    'a number above 0 or null'
    >>> describe(Literal["hf", "vllm"])
    'hf or vllm'
    """
    constraints = list(constraints)
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return describe(args[0], [*args[1:], *constraints])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            describe(part, [] if part is type(None) else constraints) for part in args
        )
    if origin is Literal:
        *others, last = [str(choice) for choice in args]
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (tuple, list):
        if len(args) == 2 and args[1] is not Ellipsis:
            return "a pair of " + _plural(args[0])
        return f"a list of {_plural(args[0])}" if args else "a list"
    if origin is dict:
        return "a mapping of names to text"
    name = (
        _NAMES.get(hint) or f"a mapping ({getattr(hint, '__name__', hint)})"
    )  # hints need not be classes
    return name + _bounds(constraints)


def found(value: object) -> str:
    """A value as it stood in the recipe, with its type when that explains the problem.

    >>> found("fast")
    "'fast' (text)"
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kind = _KINDS.get(type(value))
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return f"{shown} ({kind})" if kind else shown


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate a person most likely meant, or None when nothing is near.

    >>> closest("clip_hi", ["clip_low", "clip_high", "lam"])
    'clip_high'
    """
    names = list(candidates)
    best = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if best:
        return best[0]
    holding = [
        name
        for name in names
        if len(word) > 2 and (word in name or (len(name) > 3 and name in word))
    ]
    return holding[0] if len(holding) == 1 else None


def sentence_of(field: FieldInfo) -> str:
    """A schema field's docstring on one line."""
    return " ".join((field.description or "").split())


@cache
def field_docs(owner: type) -> dict[str, str]:
    """The string under each field of a dataclass, its bases included, read from the source.

    Python forgets these strings at run time; the source has them. A class without source (typed at
    a prompt) has none.
    """
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, after in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[statement.target.id] = " ".join(after.value.value.split())
    return docs


def first_line(owner: type) -> str:
    """The first line of a class's docstring, or of its module's when the class has none."""
    text = inspect.getdoc(owner) if owner.__doc__ else None
    if not text or text.startswith(
        f"{owner.__name__}("
    ):  # what @dataclass writes when there is no docstring
        module = inspect.getmodule(owner)
        text = inspect.getdoc(module) if module else None
    return (text or "").split("\n", 1)[0]


def _plural(hint: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "text"}.get(hint) or getattr(
        hint, "__name__", str(hint)
    )


def _bounds(constraints: Iterable[object]) -> str:
    words: list[str] = []
    for part in constraints:
        for bound in part.metadata if isinstance(part, FieldInfo) else [part]:
            match bound:
                case annotated_types.Gt(gt):
                    words.append(f"above {gt}")
                case annotated_types.Ge(ge):
                    words.append(f"at least {ge}")
                case annotated_types.Lt(lt):
                    words.append(f"below {lt}")
                case annotated_types.Le(le):
                    words.append(f"at most {le}")
                case _:
                    pass
    return " " + " and ".join(words) if words else ""
