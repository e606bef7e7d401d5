"""From `{name: grpo, clip_high: 0.28}` to a validated card: the sections whose keys are a dataclass's fields.

A card is a frozen dataclass found by its name in a registry, or by `./file.py:Class` /
`package.module:Class`.
Its fields are the keys; their types are enforced here, and what its `__post_init__` refuses becomes
a `ConfigError`.
A card may say which of its fields do nothing as it is set, by a method `without_effect() -> {field:
reason}`.
"""

import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llmac.config.familiar import suggestion
from llmac.config.guards import is_list, is_mapping
from llmac.config.words import closest, describe, found
from llmac.errors import ConfigError

ROOMS = {"algorithm": "llmac.algorithms:ALGORITHMS", "critic": "llmac.critics:CRITICS"}
"""Where each room keeps its names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A card by name, with its settings."""

    name: str
    """As the recipe writes it: a registry name or `file.py:Class`."""
    settings: Any
    """The card itself, an instance of a frozen dataclass chosen at run time."""
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """Which keys the recipe set; the others are the card's defaults."""


def registry(room: str) -> dict[str, str]:
    """Names and places of all cards of a room."""
    module, name = ROOMS[room].split(":")
    return getattr(importlib.import_module(module), name)  # rooms are named in a table above


def card_class(room: str, name: str) -> type:
    """The dataclass behind a name.

    Raises:
        ConfigError: no such name, or what it names is not a card.
    """
    from llmac.rewards.loader import resolve

    names = registry(room)
    spec = names.get(name)
    if spec is None and ":" not in name:
        near = closest(name, names)
        raise ConfigError(
            f"{room}.name: there is no {room} {name!r}."
            + (f" Did you mean {near}?" if near else "")
            + f" Known: {', '.join(sorted(names))}. Your own: ./file.py:Class"
        )
    owner = resolve(spec or name)
    if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
        raise ConfigError(f"{room}.name: {name} must name a frozen dataclass, found {owner!r}")
    if room == "algorithm" and not hasattr(owner, "policy_loss"):
        raise ConfigError(
            f"{room}.name: {name} has no policy_loss; derive it from llmac.algorithms.base.Algorithm or from a card"
        )
    if room == "critic" and not hasattr(owner, "build"):
        raise ConfigError(
            f"{room}.name: {name} has no build; see llmac/critics/value_head.py for what a critic needs"
        )
    return owner


def choose_algorithm(value: object) -> Choice:
    """`grpo`, `{name: grpo, ...}`, or a card made in Python."""
    return _choose("algorithm", value, default_name=None)


def choose_critic(value: object, algorithm: Choice) -> Choice | None:
    """The critic the recipe names, or the algorithm's own, or none where it uses none."""
    usual = algorithm.settings.wanted_critic
    if value is None:
        return (
            None
            if usual is None
            else _choose("critic", {"name": usual}, default_name=None, given=frozenset())
        )
    if usual is None:
        keys = (
            ", ".join(f"critic.{key}" for key in value) if is_mapping(value) and value else "critic"
        )
        raise ConfigError(
            f"{keys} has no effect: {algorithm.name} uses no critic. Remove it (critic=null on the command line), or "
            "choose an algorithm that has one (`llmac algorithms` lists them)"
        )
    return _choose("critic", value, default_name=usual)


def card_fields(owner: type) -> dict[str, Any]:
    """Name and type of every key of a card, in the order they are written."""
    hints = get_type_hints(owner)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(owner) if entry.init}


def idle_fields(config: Any) -> dict[str, str]:
    """Fields of a card that do nothing as it is set, with the reason."""
    idle: dict[str, str] = {}
    if getattr(config, "schedule", None) == "constant" and hasattr(
        config, "min_lr_ratio"
    ):  # cards differ in fields
        idle["min_lr_ratio"] = (
            "a constant schedule does not decay; choose schedule: linear or cosine"
        )
    declared = getattr(config, "without_effect", None)  # optional part of what a card may say
    return idle | dict(declared()) if declared is not None else idle


def _choose(
    room: str, value: object, *, default_name: str | None, given: frozenset[str] | None = None
) -> Choice:
    if isinstance(value, Choice):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _already_made(room, value)
    if not is_mapping(value):
        raise ConfigError(f"{room} must be a name or a mapping with a name, found {found(value)}")
    name = value.get("name", default_name)
    if not isinstance(name, str):
        names = ", ".join(sorted(registry(room)))
        wrong = (
            f"must be text, found {found(name)}"
            if "name" in value
            else f"is required. Known: {names}"
        )
        raise ConfigError(f"{room}.name {wrong}")
    settings = {key: entry for key, entry in value.items() if key != "name"}
    config = _build(room, name, card_class(room, name), settings)
    return Choice(name=name, settings=config, given=frozenset(value) if given is None else given)


def _already_made(room: str, config: Any) -> Choice:
    """A card built in Python keeps its registry name; anyone else's is named by its place."""
    place = f"{type(config).__module__}:{type(config).__qualname__}"
    name = next((name for name, spec in registry(room).items() if spec == place), place)
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    return Choice(name=name, settings=config, given=frozenset({"name", *changed}))


def _build(room: str, name: str, owner: type, settings: Mapping[str, Any]) -> Any:
    fields = card_fields(owner)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in fields:
            problems.append(_unknown(room, name, str(key), fields))
            continue
        try:
            values[key] = _adapter(fields[key]).validate_python(_frozen(value, fields[key]))
        except ValidationError:
            problems.append(
                f"{room}.{key} ({name}) must be {describe(fields[key])}, found {found(value)}"
            )
    missing = [
        entry.name
        for entry in dataclasses.fields(owner)
        if entry.init
        and entry.name not in settings
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    problems += [f"{room}.{key} ({name}) is required: {describe(fields[key])}" for key in missing]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return owner(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{room} {name}: {error}") from error


def _unknown(room: str, name: str, key: str, fields: Mapping[str, Any]) -> str:
    near = closest(key, fields)
    hint = f" Did you mean {near}?" if near else suggestion(key, instead_of=room)
    return f"{room}.{key} is not a field of {name}.{hint} Fields: {', '.join(fields)}"


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _frozen(value: object, hint: Any) -> object:
    """YAML knows lists only; a field typed as a tuple gets a tuple, all the way down."""
    if is_list(value) and tuple in _origins(hint):
        return tuple(_frozen(entry, hint) for entry in value)
    return value


def _origins(hint: Any) -> set[Any]:
    origin = get_origin(hint)
    if origin is typing.Annotated:
        return _origins(get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return {origin for part in get_args(hint) for origin in _origins(part)}
    return {origin or hint}
