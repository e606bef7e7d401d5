"""A recipe as text: complete YAML to save, commented YAML to read, a fingerprint to compare."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from llmac.config.cards import Choice, card_fields
from llmac.config.effects import given, idle_keys
from llmac.config.guards import is_mapping, is_sequence
from llmac.config.loading import YamlReader
from llmac.config.schema import Recipe, Section
from llmac.config.words import field_docs, first_line, sentence_of

MAY_CHANGE = frozenset(
    {
        # how long, where to, what is written down
        "run.steps",
        "run.output",
        "run.save_every",
        "run.keep_last",
        "run.resume",
        "run.log_completions_every",
        "run.trackers",
        "run.project",
        "run.watchdog_seconds",
        "run.ratio_tolerance",
        "run.push_to_hub",
        "reward.zero_warning_steps",
        "evaluation",
        # how the same numbers are computed on this machine
        "model.gradient_checkpointing",
        "model.logprob_chunk_mb",
        "actor.max_tokens_per_microbatch",
        "actor.packing",
        "rollout.gpu_memory_utilization",
        "rollout.kv_cache_mb",
        "rollout.enforce_eager",
        "rollout.tensor_parallel_size",
        "rollout.max_num_seqs",
        "rollout.probe_every",
    }
)
"""Keys a resumed run may change. All others make it another run; run.steps too may grow, and a decaying learning-rate
schedule then follows the new length."""


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as mappings, lists and scalars, every default written out."""
    return _plain(recipe)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe.

    Keys without effect in this recipe are left out: written down, they would be refused.
    """
    settings = plain(recipe)
    for key in idle_keys(recipe):
        _drop(settings, key)
    return yaml.dump(settings, Dumper=YamlWriter, sort_keys=False, allow_unicode=True, width=100)


def fingerprint(recipe: Recipe) -> str:
    """16 hexadecimal digits, the same for all recipes that may continue one run (see `MAY_CHANGE`)."""
    settings = plain(recipe)
    for key in MAY_CHANGE:
        _drop(settings, key)
    settings["reward_sources"] = [_source(entry.path) for entry in recipe.reward.functions]
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _source(function: object) -> str | None:
    """What a reward function does: the text of its file, or of a function passed from Python; None: not to be had."""
    if isinstance(function, str):
        file = Path(function.rpartition(":")[0]).expanduser()
        return file.read_text(encoding="utf-8") if file.is_file() else None
    if inspect.isfunction(function):
        with contextlib.suppress(OSError):  # typed at a prompt
            return inspect.getsource(function)
    return None


def show(recipe: Recipe, overrides: Sequence[str] = ()) -> str:
    """Every key with its value, where the value came from, and what it means. Valid YAML, ready to be pasted.

    Args:
        recipe: as loaded.
        overrides: the ones it was loaded with, to tell them from the file's keys.
    """
    changed = tuple(override.partition("=")[0].strip().removeprefix("--") for override in overrides)
    idle = idle_keys(recipe)
    rows = list(_rows(recipe, "", 0, changed, idle, lambda key: given(recipe, key)))
    width = min(max(len(text) for text, _ in rows), 44)
    lines = [f"{text:<{width}}  # {comment}" if comment else text for text, comment in rows]
    sections = [
        f"\n{line}" if index and not line.startswith(" ") else line
        for index, line in enumerate(lines)
    ]
    return "\n".join(sections) + "\n"


def describe_card(name: str, owner: type) -> str:
    """Name and first sentence of a card, for a list of them."""
    return f"{name:<22} {first_line(owner)}"


def _rows(
    node: Section | Choice,
    prefix: str,
    depth: int,
    changed: Sequence[str],
    idle: Mapping[str, str],
    is_given: Callable[[str], bool],
) -> Iterator[tuple[str, str]]:
    pad = "  " * depth
    for name, value, meaning in _entries(node):
        key = f"{prefix}{name}"
        if isinstance(value, Section | Choice):
            yield f"{pad}{name}:", meaning
            yield from _rows(value, f"{key}.", depth + 1, changed, idle, is_given)
        elif is_sequence(value) and value and isinstance(value[0], Section):
            yield f"{pad}{name}:", meaning
            for index, entry in enumerate(value):
                inner = list(_rows(entry, f"{key}[{index}].", depth + 2, changed, idle, is_given))
                text, comment = inner[0]
                yield f"{pad}- {text.lstrip()}", comment
                yield from [(f"{text[2:]}", comment) for text, comment in inner[1:]]
        else:
            origin = (
                _origin(key, changed, is_given)
                if "." in key
                else "default"
                if value is None
                else "recipe"
            )
            text = f"{name}: {_scalar(_plain(value))}"
            if key in idle:
                yield f"{pad}# {text}", f"no effect here. {meaning}"
            else:
                yield f"{pad}{text}", f"{origin}. {meaning}"


def _entries(node: Section | Choice) -> Iterator[tuple[str, Any, str]]:
    if isinstance(node, Choice):
        card: type[Any] = node.settings.__class__
        yield "name", node.name, first_line(card)
        docs = field_docs(card)
        for name in card_fields(card):
            yield name, getattr(node.settings, name), docs.get(name, "")
    else:
        for name, field in type(node).model_fields.items():
            yield name, getattr(node, name), sentence_of(field)


def _origin(key: str, changed: Sequence[str], is_given: Callable[[str], bool]) -> str:
    dotted = key.replace("[", ".").replace("]", "")
    if any(dotted == name or dotted.startswith(f"{name}.") for name in changed):
        return "override" if is_given(key) else "default"
    return "recipe" if is_given(key) else "default"


def _scalar(value: Any) -> str:
    text = yaml.dump(
        value, Dumper=YamlWriter, default_flow_style=True, allow_unicode=True, width=10**9
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Choice):
        card: type[Any] = value.settings.__class__
        fields = card_fields(card)
        return {"name": value.name} | {
            name: _plain(getattr(value.settings, name)) for name in fields
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if is_mapping(value):
        return {key: _plain(entry) for key, entry in value.items()}
    if is_sequence(value):
        return [_plain(entry) for entry in value]
    if callable(value):
        named = (
            value if hasattr(value, "__qualname__") else type(value)
        )  # objects with __call__ have no name
        return f"{named.__module__}:{named.__qualname__}"
    return value


def _drop(settings: Any, key: str) -> None:
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    for part in parents:
        settings = settings[int(part)] if part.isdigit() else settings.get(part)
        if settings is None:
            return
    settings.pop(last, None)


class YamlWriter(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or our reader would take for something else than text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *YamlReader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *YamlReader.yaml_implicit_resolvers}
    }

    def represent_str(self, data: str) -> yaml.ScalarNode:
        r"""Text of several lines stays on one, with \n."""
        style = '"' if "\n" in data else None
        return yaml.ScalarNode("tag:yaml.org,2002:str", data, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out each time."""
        return True


YamlWriter.add_representer(str, YamlWriter.represent_str)
