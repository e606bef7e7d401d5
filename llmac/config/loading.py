"""A file or a mapping, and overrides, to a checked `Recipe`, or one `ConfigError` in plain words."""

import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from llmac.config.cards import card_class, card_fields
from llmac.config.effects import check_effects, check_sense
from llmac.config.familiar import suggestion
from llmac.config.guards import is_dict, is_list, is_mapping
from llmac.config.schema import Recipe, Section, reward_short_forms
from llmac.config.words import closest, describe, found, sentence_of
from llmac.errors import ConfigError


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe, complete, typed and free of keys that would do nothing.

    Args:
        source: a YAML file, or the same as a mapping (reward functions may then be callables, and
        the algorithm or
            critic a card made in Python).
        overrides: `key.sub=value`, applied in order over the source; values are read as the type of
        the key.

    Raises:
        ConfigError: naming the field, who owns it, what was found and the closest valid key.
        Several problems are
            reported together.

    >>> quick = load_recipe(
    ...     {"model": {"name": "gpt2"}, "data": {"name": "openai/gsm8k"}, "reward": "rewards.py:exact",
    ...      "algorithm": "grpo", "run": {"steps": 10, "output": "runs/a"}},
    ...     ["algorithm.group_size=4"],
    ... )
    >>> quick.algorithm.settings.group_size
    4
    """
    if isinstance(source, Mapping):
        settings, folder = _copy(source), None
    else:
        settings, folder = read_yaml(source), Path(source).parent
    _apply(overrides, settings)
    _anchor(settings, folder)
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(in_words(error)) from None
    check_effects(recipe)
    check_sense(recipe)
    return recipe


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read by the rules of YAML 1.2: 1e-6 is a number, `no` and `off` are text.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key written twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from None
    try:
        content = yaml.load(text, Loader=YamlReader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path} is not valid YAML{place}: {error.problem or error.context}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not is_dict(content):
        raise ConfigError(
            f"{path} must hold a mapping with the sections {', '.join(Recipe.model_fields)}, found {found(content)}"
        )
    return content


class YamlReader(yaml.SafeLoader):
    """YAML 1.2's core schema, and no key twice.

    PyYAML's own rules are those of 1.1: they read 1e-6 as text and `no` as false.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node, refused when it has a key twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} is written twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
for _tag, _pattern, _starts in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+"), list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
):
    YamlReader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType] - untyped stub
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), _starts
    )
YamlReader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _apply(overrides: Sequence[str], settings: dict[str, Any]) -> None:
    parsed = [_split(override) for override in overrides]
    # A card's name first, wherever it was typed: it decides what the section's other keys mean.
    for key, text in sorted(
        parsed, key=lambda pair: pair[0] not in ("algorithm", "critic", *_NAMES_OF_CARDS)
    ):
        _set(settings, key, text)


_NAMES_OF_CARDS = ("algorithm.name", "critic.name")


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    key = key.strip().removeprefix("--")
    if not equals:
        raise ConfigError(
            f"override {override!r} has no '='; write key.sub=value, for example actor.lr=1e-6"
        )
    if not key or any(not part for part in key.split(".")):
        raise ConfigError(
            f"override {override!r} names no key; write key.sub=value, for example actor.lr=1e-6"
        )
    return key, text


def _set(settings: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    node: Any = settings
    for depth, part in enumerate(parents):
        child = _step(node, part, key)
        if child is None:
            child = {}
        elif isinstance(child, str) and depth == 0 and part in ("algorithm", "critic"):
            child = {"name": child}
        elif depth == 0 and part == "reward":
            child = reward_short_forms(child)
        elif not (is_dict(child) or is_list(child)):
            above = ".".join(parents[: depth + 1])
            raise ConfigError(
                f"override {key}: {above} is the single value {found(child)}, it has no {last!r} in it"
            )
        node[int(part) if is_list(node) else part] = child
        node = child
    _step(node, last, key)
    node[int(last) if is_list(node) else last] = _parse(key, text, _hint(key, settings))


def _step(node: Any, part: str, key: str) -> Any:
    if is_list(node):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(
                f"override {key}: {part!r} is not the number of one of {len(node)} entries, from 0"
            )
        return node[int(part)]
    return node.get(part)


def _parse(key: str, text: str, hint: Any) -> Any:
    if _is_text(hint) and not text.lstrip().startswith(("'", '"')):
        return None if text.strip() in ("null", "~") and type(None) in _parts(hint) else text
    try:
        return yaml.load(text, Loader=YamlReader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)  # only marked errors have one
        raise ConfigError(
            f"override {key}={text}: the value is not valid YAML: {problem}"
        ) from None


def _is_text(hint: Any) -> bool:
    kinds = _parts(hint) - {type(None)}
    return bool(kinds) and all(kind is str or isinstance(kind, str) for kind in kinds)


def _parts(hint: Any) -> set[Any]:
    """The alternatives of a type; of a Literal, its values."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _parts(args[0])
    if origin in (typing.Union, types.UnionType):
        return {kind for part in args for kind in _parts(part)}
    return set(args) if origin is Literal else {origin or hint}


def _hint(key: str, settings: Mapping[str, Any]) -> Any:
    """The type of a dotted key, or None where the schema does not know it."""
    hint: Any = Recipe
    parts = key.split(".")
    if len(parts) == 2 and parts[0] in ("algorithm", "critic"):
        return _card_hint(parts[0], parts[1], settings)
    for part in parts:
        owner = _section_in(hint)
        if owner is not None:
            field = owner.model_fields.get(part)
            hint = field.annotation if field else None
        elif part.isdigit() or get_origin(hint) is dict:
            hint = get_args(hint)[-1 if get_origin(hint) is dict else 0] if get_args(hint) else None
        else:
            return None
    return hint


def _card_hint(room: str, key: str, settings: Mapping[str, Any]) -> Any:
    if key == "name":
        return str
    section = settings.get(room)
    name = section.get("name") if is_mapping(section) else section
    if not isinstance(name, str):
        return None
    try:
        return card_fields(card_class(room, name)).get(key)
    except ConfigError:  # reported by validation, with the other problems
        return None


def _section_in(hint: Any) -> type[Section] | None:
    return next(
        (part for part in _parts(hint) if isinstance(part, type) and issubclass(part, Section)),
        None,
    )


def _anchor(settings: dict[str, Any], folder: Path | None) -> None:
    """Replace files that are not where the command runs, but beside the recipe, by their place there."""
    if folder is None:
        return

    def found_at(text: str, file: str) -> str:
        beside = folder / file
        return (
            str(beside) + text[len(file) :]
            if not Path(file).exists() and beside.is_file()
            else text
        )

    def code(text: object) -> object:
        if not isinstance(text, str):
            return text
        file, colon, _ = text.rpartition(":")
        return found_at(text, file) if colon and file.endswith(".py") else text

    reward = settings.get("reward")
    functions = reward.get("functions") if is_dict(reward) else reward
    if is_list(functions):
        for index, entry in enumerate(functions):
            if is_dict(entry) and "path" in entry:
                entry["path"] = code(entry["path"])
            else:
                functions[index] = code(entry)
    elif isinstance(reward, str):
        settings["reward"] = code(reward)
    elif is_dict(reward) and "path" in reward:
        reward["path"] = code(reward["path"])
    for room in ("algorithm", "critic"):
        section = settings.get(room)
        if is_dict(section) and "name" in section:
            section["name"] = code(section["name"])
        elif isinstance(section, str):
            settings[room] = code(section)
    evaluation = settings.get("evaluation")
    for section in (
        settings.get("data"),
        evaluation.get("data") if is_dict(evaluation) else None,
    ):
        if is_dict(section) and isinstance(section.get("name"), str):
            section["name"] = found_at(section["name"], section["name"])


def _copy(value: Any) -> Any:
    if is_mapping(value):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if is_list(value) else value


def in_words(error: ValidationError) -> str:
    """All problems of a recipe, one a line; a single one stands alone."""
    lines: dict[
        str, None
    ] = {}  # an ordered set: a union reports a problem once for each of its parts
    for problem in error.errors(include_url=False):
        lines.update(
            dict.fromkeys(re.split(r"\n(?! )", _sentence(problem)))
        )  # an indented line goes with the last
    if len(lines) == 1:
        return next(iter(lines))
    return f"{len(lines)} problems in the recipe\n" + "\n".join(f"- {line}" for line in lines)


def _sentence(problem: Mapping[str, Any]) -> str:
    owners, path, field, rest = _walk(problem["loc"])
    owner = owners[-1]
    if problem["type"] == "value_error":  # raised by this project, already in words
        return str(problem["ctx"]["error"])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(owner, path, str(rest[0]))
    if problem["type"] == "missing" and not rest:
        meaning = f": {sentence_of(field).rstrip('.')}" if field else ""
        return f"{path} is required{meaning}{_missing_hint(path)}"
    section = _section_in(field.annotation) if field else owner
    if problem["type"] == "model_type" and section is not None:
        keys = ", ".join(section.model_fields)
        return f"{path or 'a recipe'} must be a mapping of {keys}, found {found(problem['input'])}"
    assert field is not None, problem
    entry = (
        " (each entry)"
        if rest and problem["type"] != "missing" and isinstance(rest[0], int)
        else ""
    )
    value = problem["input"]
    as_list = (
        f"; write [{value}]" if problem["type"] == "tuple_type" and isinstance(value, str) else ""
    )
    return f"{path}{entry} must be {describe(field.annotation, field.metadata)}, found {found(value)}{as_list}"


def _missing_hint(path: str) -> str:
    if path == "evaluation.data":
        return ". Give it, or leave the section `evaluation` out"
    return ""


def _unknown_key(owner: type[Section], path: str, key: str) -> str:
    fields = list(owner.model_fields)
    if owner is Recipe:
        here, kind, listing = "", "a section of a recipe", "Sections"
    else:
        here, kind, listing = f"{path}.", f"a field of {path}", "Fields"
    near = closest(key, fields)
    elsewhere = sorted(_owners_of(key))
    hint = suggestion(key, instead_of=path)
    if near and (not elsewhere or near.startswith(key)):
        hint = f" Did you mean {here}{near}?"
    elif elsewhere:
        hint = f" Did you mean {' or '.join(elsewhere)}?"
    return f"{here}{key} is not {kind}.{hint} {listing}: {', '.join(fields)}"


def _owners_of(key: str) -> Iterable[str]:
    for name, field in Recipe.model_fields.items():
        section = _section_in(field.annotation)
        if section is not None and key in section.model_fields:
            yield f"{name}.{key}"


def _walk(
    loc: Sequence[int | str],
) -> tuple[list[type[Section]], str, FieldInfo | None, Sequence[int | str]]:
    """Pydantic's location, as far as it names our fields: (owners, dotted path, field, rest)."""
    owners: list[type[Section]] = [Recipe]
    owner: type[Section] | None = Recipe
    path, field = "", None
    for index, part in enumerate(loc):
        if isinstance(part, int) and field is not None:
            inside = [_section_in(arg) for arg in get_args(field.annotation)]
            if not any(inside):
                return owners, path, field, loc[index:]
            path, owner = f"{path}[{part}]", inside[0]
            owners.append(inside[0])  # type: ignore[arg-type]
            continue
        if owner is None or part not in owner.model_fields:
            return owners, path, field, loc[index:]
        field = owner.model_fields[str(part)]
        path = f"{path}.{part}" if path else str(part)
        owner = _section_in(field.annotation)
        if owner is not None:
            owners.append(owner)
    return owners, path, field, ()


def _similar_file(path: Path) -> str:
    folders = [folder for folder in (path.parent, Path("recipes")) if folder.is_dir()]
    recipes = {str(file): file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    by_stem = {file.stem: name for name, file in recipes.items()}
    near = closest(path.stem, by_stem)
    if near:
        return f" Did you mean {by_stem[near]}?"
    return f" There are: {', '.join(recipes)}" if recipes else ""
