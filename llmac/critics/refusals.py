"""What the settings of critics refuse in the same words."""

import dataclasses
import math

from llmac.runtime.learner import Optimization

_OPTIMIZER = frozenset(field.name for field in dataclasses.fields(Optimization))


def refuse_unless(holds: bool, message: str) -> None:
    """What a card's `__post_init__` says of a setting that cannot work.

    Raises:
        ValueError: it does not hold.
    """
    if not holds:
        raise ValueError(message)


def refuse_range(name: str, found: tuple[float, float], ends: str) -> None:
    """Refuse a range of returns that is empty or has no finite end.

    Args:
        name: of the field.
        found: its value.
        ends: what the two numbers are.

    Raises:
        ValueError: it is one.
    """
    low, high = found
    refuse_unless(
        -math.inf < low < high < math.inf,
        f"{name} must be ({ends}), finite and ascending, found ({low}, {high})",
    )


def refuse_infinite(settings: object) -> None:
    """Refuse fields of a critic's card that are infinite or no number; an optimizer's check their own.

    Raises:
        ValueError: there is one.
    """
    assert dataclasses.is_dataclass(settings), "cards are"
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        refuse_unless(
            field.name in _OPTIMIZER
            or all(math.isfinite(x) for x in numbers if isinstance(x, float)),
            f"{field.name} must be finite, found {list(value) if isinstance(value, tuple) else value}",
        )
