"""The parts of the pages that are made from the code: commands, configuration keys, statistics.

They stand in the pages, so that these read well without the site, between two comments:

    <!-- generated: NAME -->
    <!-- end -->

`python docs/references.py` writes them anew. The site makes them anew whenever it is built, and a
test fails where a page differs from the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from ppo_cli.cli.app import app
from ppo_cli.config.schema import json_schema
from ppo_cli.config.sweep import sweep_schema
from ppo_cli.evaluation.quality import all_statistics
from ppo_cli.ppo.statistics import Statistic

DOCS = Path(__file__).parent
REGION = re.compile(r"(?<=<!-- generated: )([\w/ ]+)( -->\n).*?(?=\n<!-- end -->)", re.DOTALL)
PRACTICALLY_UNLIMITED = 10**9


def with_references(text: str) -> str:
    """A page with its generated parts as they are today.

    Raises:
        KeyError: it asks for one that is not there.
    """

    def part(found: re.Match[str]) -> str:
        kind, _, rest = found[1].partition(" ")
        return f"{found[1]}{found[2]}\n{PARTS[kind](rest)}\n"

    return REGION.sub(part, text)


def commands(_: str = "") -> str:
    """Every command with its arguments and options, in the groups of its help."""
    tree: Any = typer.main.get_command(app)
    return "\n\n".join(command_section(name, one) for name, one in tree.commands.items())


def command_section(name: str, command: Any) -> str:
    """A command's help: what it does, its usage, a table for each group, examples."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["ppo-cli", name, "[OPTIONS]", *map(metavar, arguments)])
    parts = [f"## `{name}`", paragraphs(command.help), f"```text\n{usage}\n```"]
    groups: dict[str, list[str]] = {}
    for one in command.params:
        if not one.hidden:
            kind = "Arguments" if one in arguments else getattr(one, "rich_help_panel", None)
            groups.setdefault(kind or "Options", []).append(row(f"`{names_of(one)}`", about(one)))
    for group, rows in groups.items():
        head = table("argument" if group == "Arguments" else "option", "meaning")
        parts.append("\n".join([f"**{group}**\n", *head, *rows]))
    if command.epilog:
        examples = "\n".join(line.strip() for line in command.epilog.splitlines())
        parts.append(f"```\n{examples}\n```")
    return "\n\n".join(parts)


def metavar(argument: Any) -> str:
    shown = str(argument.metavar or argument.name.upper())
    return shown if argument.required or shown.startswith("[") else f"[{shown}]"


def names_of(parameter: Any) -> str:
    """`-n, --num-samples N`, `--chat/--no-chat` or `MODEL`."""
    if parameter.param_type_name == "argument":
        return metavar(parameter).strip("[]")
    names = "/".join([", ".join(parameter.opts), *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'VALUE'}"


def about(parameter: Any) -> str:
    """What a parameter does, its limits, and its default if the text does not name it."""
    text = " ".join((parameter.help or "").split())
    holder = getattr(parameter, "type", parameter)  # older releases of typer have click's types
    low, high = (getattr(holder, side, None) for side in ("min", "max"))
    if low is not None and (high is None or high > PRACTICALLY_UNLIMITED):
        text += f" At least {low:g}." if low else ""
    elif low is not None:
        text += f" {low:g} to {high:g}."
    default = getattr(parameter.default, "value", parameter.default)
    if isinstance(default, bool):
        default = next(iter(parameter.opts if default else parameter.secondary_opts), None)
    is_shown = isinstance(default, (str, int, float)) and "Default: " not in text
    return f"{text} Default: `{default}`." if is_shown else text


def keys(section: str) -> str:
    """The table of a section of the configuration, or of the keys of a sweep."""
    if section == "sweep":
        schema = json.loads(sweep_schema())
        return key_table(schema, schema)
    schema = json.loads(json_schema())
    kind = schema["properties"][section]
    name = next(map(section_of, alternatives(kind)))
    return f"{kind['description']}\n\n{key_table(schema, schema['$defs'][name])}"


def key_table(schema: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    rows = key_rows(schema, section, "")
    return "\n".join([*table("key", "value", "default", "meaning"), *rows])


def key_rows(schema: Mapping[str, Any], section: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A row for each key of a section, those of a section inside it behind its own."""
    for key, value in section["properties"].items():
        default = json.dumps(value["default"]) if "default" in value else "{}"
        default = "required" if key in section.get("required", ()) else f"`{default}`"
        yield row(f"`{prefix}{key}`", value_of(value), default, paragraphs(value["description"]))
        for option in alternatives(value):
            if name := section_of(option):
                dots = next((dots for part, dots in INSIDE.items() if part in option), ".")
                yield from key_rows(schema, schema["$defs"][name], f"{prefix}{key}{dots}")


INSIDE = {"items": "[].", "additionalProperties": ".KEY."}
"""What stands between the key of many sections and a key of one of them."""


def value_of(kind: Mapping[str, Any]) -> str:
    """What a key takes, in a few words: its type, and its limits or choices."""
    if "anyOf" in kind or "oneOf" in kind:
        found = dict.fromkeys(map(value_of, kind.get("anyOf", kind.get("oneOf"))))
        return " or ".join(sorted(found, key="null".__eq__))
    if "enum" in kind or "const" in kind:
        return ", ".join(f"`{item}`" for item in kind.get("enum", [kind.get("const")]))
    if "$ref" in kind:
        return "any" if kind["$ref"].endswith("/JsonValue") else "section"
    if kind.get("type") == "array":
        return f"list of {value_of(kind.get('items', {}))}"
    names = {"string": "text", "boolean": "true, false", "object": "mapping"}
    limits = [
        f" {sign} {kind[name]:g}" if kind[name] < PRACTICALLY_UNLIMITED else ""
        for name, sign in LIMITS.items()
        if name in kind
    ]
    return names.get(kind.get("type", ""), kind.get("type", "any")) + ",".join(filter(None, limits))


LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def alternatives(kind: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The forms that a value may have, sections first."""
    options = kind.get("anyOf", kind.get("oneOf", [kind]))
    return sorted(options, key=lambda option: not section_of(option))


def section_of(kind: Mapping[str, Any]) -> str:
    """The name of the section that a value is, or has many of; empty for another value."""
    for part in INSIDE:
        if isinstance(kind.get(part), dict):
            return section_of(alternatives(kind[part])[0])
    name = kind.get("$ref", "").rpartition("/")[2]
    return "" if name == "JsonValue" else name


def statistics(prefixes: str) -> str:
    """The table of the statistics whose keys begin with one of these."""
    found = [
        row(f"`{key}`", explanation(one))
        for key, one in all_statistics().items()
        if key.startswith(tuple(prefixes.split()))
    ]
    return "\n".join([*table("key", "meaning"), *found])


def explanation(one: Statistic) -> str:
    """What is known of a statistic, a line for each part."""
    meaning = f"{one.meaning}; array" if one.is_array else one.meaning
    parts = {
        "Unit": one.unit,
        "Formula": one.formula and f"`{one.formula}`",
        "Healthy": one.healthy,
        "If not": one.remedy,
    }
    lines = [f"*{name}:* {text}" for name, text in parts.items() if text]
    return "<br>".join([". ".join(filter(None, [meaning, one.detail])), *lines])


def table(*names: str) -> list[str]:
    return [row(*names), "|---" * len(names) + "|"]


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def paragraphs(text: str) -> str:
    """Text without the line breaks of the source inside its paragraphs."""
    return "\n\n".join(" ".join(one.split()) for one in text.strip().split("\n\n"))


PARTS: dict[str, Callable[[str], str]] = {
    "commands": commands,
    "keys": keys,
    "statistics": statistics,
}


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := with_references(text)) != text:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
