"""Every key of the configuration, with what it means and the values it may have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ppo_cli.config.schema import RunConfig


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
        name: `section.key`, as `--set` takes it.
        about: what it means, its first sentence.
        values: those it may have, as YAML has them, if they are few; otherwise its default, and
            nothing where that is null, a list or a mapping.
    """

    name: str
    about: str
    values: tuple[str, ...]


def keys() -> Iterator[Key]:
    """The keys in the order of the documents; those inside lists are left out."""
    schema = RunConfig.model_json_schema()
    for section, kind in schema["properties"].items():
        yield from _of(schema["$defs"], kind["$ref"], f"{section}.")


def _of(sections: Mapping[str, Any], reference: str, prefix: str) -> Iterator[Key]:
    for name, value in sections[reference.rpartition("/")[2]]["properties"].items():
        forms = value.get("anyOf", [value])
        about = " ".join(value["description"].split()).partition(". ")[0]
        yield Key(prefix + name, about.rstrip("."), tuple(_values(value, forms)))
        for form in forms:
            if "$ref" in form:
                yield from _of(sections, form["$ref"], f"{prefix}{name}.")


def _values(value: Mapping[str, Any], forms: list[Mapping[str, Any]]) -> Iterator[str]:
    default = value.get("default")
    found = [item for form in forms for item in form.get("enum", [])]
    found += [item for form in forms if form.get("type") == "boolean" for item in (True, False)]
    if found and {"type": "null"} in forms:
        found.append(None)
    if not found and isinstance(default, str | int | float):
        found = [default]
    for item in found:
        yield item if isinstance(item, str) else json.dumps(item)
