"""What makes a recipe another run than the one that a folder belongs to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmac.config.guards import is_mapping
from llmac.config.schema import Recipe
from llmac.config.show import MAY_CHANGE, dump

ABSENT = "nothing"


def differences(recipe: Recipe, saved: Path) -> list[str]:
    """Keys with other values than in a run's `config.yaml`, and both values.

    Keys that a resumed run may change are left out, and so are the texts of reward functions, of which only the place
    is saved.

    Args:
        recipe: of this run.
        saved: `config.yaml` of the other; if it is gone or no mapping, nothing is known.
    """
    if not saved.is_file():
        return []
    before = yaml.safe_load(saved.read_text(encoding="utf-8"))
    if not is_mapping(before):
        return []
    there, here = dict(_flat(before)), dict(_flat(yaml.safe_load(dump(recipe))))
    return [
        f"{key} is {there.get(key, ABSENT)} there and {here.get(key, ABSENT)} here"
        for key in {**there, **here}
        if there.get(key, ABSENT) != here.get(key, ABSENT) and not _may_change(key)
    ]


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if is_mapping(value):
            yield from _flat(value, name)
        else:
            yield name, value


def _may_change(key: str) -> bool:
    return any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)
