"""What a value read from YAML is, in a way a type checker follows."""

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_list(value: object) -> TypeGuard[list[Any]]:
    """A YAML sequence."""
    return isinstance(value, list)


def is_sequence(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """A YAML sequence, or what one becomes in a frozen section."""
    return isinstance(value, list | tuple)


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """A YAML mapping; keys that are not text fail later, as unknown keys."""
    return isinstance(value, Mapping)


def is_dict(value: object) -> TypeGuard[dict[str, Any]]:
    """A mapping of a recipe under construction."""
    return isinstance(value, dict)
