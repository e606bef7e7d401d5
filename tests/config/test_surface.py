"""The keys a user may type, frozen. A change here is a change for every recipe anyone has written."""

import json
from pathlib import Path

from llmac.config import Recipe
from llmac.config.cards import card_class, card_fields, registry
from llmac.config.schema import Section
from llmac.config.words import describe

SNAPSHOT = Path(__file__).with_name("schema_snapshot.json")


def surface():
    """Every key with what it takes and its default."""
    keys = {}

    def walk(section, prefix):
        for name, field in section.model_fields.items():
            inner = [part for part in sections_in(field.annotation) if part is not section]
            for part in inner:
                walk(part, f"{prefix}{name}.")
            if not inner:
                default = (
                    "required"
                    if field.is_required()
                    else field.get_default(call_default_factory=True)
                )
                keys[f"{prefix}{name}"] = (
                    f"{describe(field.annotation, field.metadata)} = {default}"
                )

    walk(Recipe, "")
    for room in ("algorithm", "critic"):
        for name in sorted(registry(room)):
            keys[f"{room} {name}"] = ", ".join(sorted(card_fields(card_class(room, name))))
    return keys


def sections_in(hint):
    if isinstance(hint, type) and issubclass(hint, Section):
        yield hint
    for part in getattr(hint, "__args__", ()):
        yield from sections_in(part)


def test_keys_types_and_defaults_change_only_on_purpose():
    """To accept a change: python tests/config/test_surface.py, and a line in CHANGELOG.md."""
    now, before = surface(), json.loads(SNAPSHOT.read_text())
    assert now.keys() - before.keys() == set(), "new keys"
    assert before.keys() - now.keys() == set(), "keys gone"
    for key, what in now.items():
        assert what == before[key], key


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n")
