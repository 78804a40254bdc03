"""Writes settings as YAML with a comment above each key: its description in the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ppo_cli.config.schema import RunConfig
from ppo_cli.utils.yaml_io import dump_yaml

WIDTH = 88  # columns of a line of comment

Schema = Mapping[str, Any]


def commented_yaml(values: Mapping[str, Any], *, every_key: bool = False) -> str:
    """Nested settings as YAML, each key below its description.

    Args:
        values: sections with keys, as in a configuration file.
        every_key: also write the keys that `values` leaves out, with their defaults and commented
            out; otherwise each section ends with their names.
    """
    schema = RunConfig.model_json_schema()
    defaults = RunConfig().model_dump(mode="json")
    lines: list[str] = []
    for section, property_ in schema["properties"].items():
        kinds = list(_objects(property_, schema["$defs"]))
        about = property_.get("description") or kinds[0].get("description", "")
        keys = values.get(section, {})
        lines += ["", *_comment(about, ""), f"{section}:{'' if keys else ' {}'}"]
        lines += _lines(keys, kinds, schema["$defs"], "  ")
        if isinstance(keys, dict):
            missing = {k: v for k, v in defaults[section].items() if k not in keys}
            lines += _others(missing, kinds, every_key)
    return "\n".join(lines).lstrip("\n") + "\n"


def _objects(schema: Schema, definitions: Schema) -> Iterator[Schema]:
    """The schemas of mappings that a key may hold, in a list too."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        yield schema
    for option in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from _objects(option, definitions)
    if isinstance(schema.get("items"), dict):
        yield from _objects(schema["items"], definitions)


def _lines(value: Any, kinds: Sequence[Schema], definitions: Schema, indent: str) -> Iterator[str]:
    """Lines of a mapping, or of a list of mappings."""
    if isinstance(value, list):
        for item in value:
            yield f"{indent}-"
            yield from _lines(item, kinds, definitions, indent + "  ")
        return
    for key, inner in value.items():
        known = _property(key, kinds)
        yield from _comment(known.get("description", ""), indent)
        if inner and _is_nested(inner):
            yield f"{indent}{key}:"
            yield from _lines(inner, [*_objects(known, definitions)], definitions, indent + "  ")
        else:
            yield from textwrap.indent(dump_yaml({key: inner}), indent).splitlines()


def _property(key: str, kinds: Sequence[Schema]) -> Schema:
    """The schema of a key in the first of `kinds` that has it."""
    found: Schema = next((k["properties"][key] for k in kinds if key in k["properties"]), {})
    return found


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(item, dict) for item in value)
    )


def _others(missing: Mapping[str, Any], kinds: Sequence[Schema], every_key: bool) -> Iterator[str]:
    """The keys of a section that are left out, in comments."""
    if not missing:
        return
    if not every_key:
        yield from _comment(f"Other keys: {', '.join(missing)}.", "  ")
        return
    for key, value in missing.items():
        yield from _comment(_property(key, kinds).get("description", ""), "  ")
        yield from (f"  #{line}" for line in dump_yaml({key: value}).splitlines())


def _comment(text: str, indent: str) -> list[str]:
    width = WIDTH - len(indent)
    lines = textwrap.wrap(" ".join(text.split()), width - 2, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]
