"""The documents: links, named functions and tables of keys agree with what is there.

`python tests/test_documents.py` writes the tables of docs/configuration.md and docs/sweep.md anew.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.config.schema import RunConfig, json_schema
from ppo_cli.config.sweep import sweep_schema
from ppo_cli.evaluation.quality import explained_statistics
from ppo_cli.ppo.statistics import RUN_STATISTICS, STATISTICS

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "docs" / "configuration.md"
SWEEP = ROOT / "docs" / "sweep.md"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/benchmarks/*.md")})
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`([\w.]+)(?:\(\))?` in \[`?[^\]]+`?\]\(([^)\s]+\.py)\)")
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_has_its_target(page: Path) -> None:
    missing = []
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_named_function_is_in_the_file_that_is_linked(page: Path) -> None:
    missing = []
    for name, target in NAMED.findall(prose(page)):
        path = (page.parent / target).resolve()
        if not path.exists() or name.split(".")[-1] not in defined(path):
            missing.append(f"{name} in {target}")
    assert missing == []


def defined(path: Path) -> set[str]:
    """Names of a file's functions, classes, methods and variables."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in nodes if isinstance(node, kinds)}
    stored = (node for node in nodes if isinstance(node, ast.Name))
    return names | {node.id for node in stored if isinstance(node.ctx, ast.Store)}


def test_the_search_for_functions_finds_some() -> None:
    found = NAMED.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(found) > 10


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120


def test_every_statistic_is_explained() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert sorted(explained) == sorted([*STATISTICS, *RUN_STATISTICS, *explained_statistics()])


def test_every_configuration_key_is_explained() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert text == with_tables(text), "write them anew: python tests/test_documents.py"


def test_every_key_of_a_sweep_is_explained() -> None:
    text = SWEEP.read_text(encoding="utf-8")
    assert text == with_sweep_table(text), "write them anew: python tests/test_documents.py"


def with_sweep_table(text: str) -> str:
    """docs/sweep.md with the table of a sweep's keys, which is its first one."""
    root = json.loads(sweep_schema())
    schema = {**root, "$defs": {**root["$defs"], "Sweep": root}}
    parameter = rows(schema, {"$ref": "#/$defs/Parameter"}, "parameters.KEY.")
    table = "\n".join([*HEAD, *rows(schema, {"$ref": "#/$defs/Sweep"}), *parameter])
    start = "\n".join(HEAD)
    before, _, after = text.partition(start)
    return before + table + after[re.search(r"\n\n", after).start() :]  # type: ignore[union-attr]


def with_tables(text: str) -> str:
    """docs/configuration.md with the table of each section that it has a heading for."""
    schema = json.loads(json_schema())
    for section, kind in schema["properties"].items():
        table = "\n".join([*HEAD, *rows(schema, kind)])
        heading = re.escape(f"### `{section}`")
        text, count = re.subn(
            rf"(^{heading}\n\n)\| key.*?(?=\n\n|\n\Z)",
            lambda found, table=table: found[1] + table,
            text,
            flags=re.MULTILINE | re.DOTALL,
        )
        assert count == 1, f"docs/configuration.md has no table of {section}"
    return text


KEY = re.compile(r"`(policy|prompts|rollout|reward|ppo|run)\.(?!(?:yaml|py|json)\b)([a-z_]+)\b")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_key_that_a_page_names_is_there(page: Path) -> None:
    known = {name: set(vars(getattr(RunConfig(), name))) for name in RunConfig.model_fields}
    found = KEY.findall(page.read_text(encoding="utf-8"))
    assert [f"{section}.{key}" for section, key in found if key not in known[section]] == []


HEAD = ("| key | default | meaning |", "|---|---|---|")


def rows(schema: dict[str, Any], kind: dict[str, Any], prefix: str = "") -> list[str]:
    """A table's row for each key of a section, those of a section inside it behind its own."""
    found = []
    name = next(map(section_of, alternatives(kind)))
    for key, value in schema["$defs"][name]["properties"].items():
        meaning = " ".join(value["description"].split()).replace("|", "\\|")
        inner = [option for option in alternatives(value) if "enum" in option]
        values = [str(item) for option in inner for item in option["enum"]]
        choice = f" One of {', '.join(f'`{item}`' for item in values)}." if values[1:] else ""
        needed = key in schema["$defs"][name].get("required", ())
        default = json.dumps(value["default"]) if "default" in value else "{}"
        default = "required" if needed else default
        found.append(f"| `{prefix}{key}` | `{default}` | {meaning}{choice} |")
        for option in alternatives(value):
            if section_of(option):
                dots = "[]." if "items" in option else "."
                found += rows(schema, option, f"{prefix}{key}{dots}")
    return found


def alternatives(kind: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms that a value may have."""
    return sorted(
        kind.get("anyOf", kind.get("oneOf", [kind])), key=lambda option: not section_of(option)
    )


def section_of(kind: dict[str, Any]) -> str:
    """The name of the section that a value is, or a list of; empty for another value."""
    return kind.get("$ref", kind.get("items", {}).get("$ref", "")).rpartition("/")[2]


if __name__ == "__main__":
    CONFIGURATION.write_text(
        with_tables(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8"
    )
    SWEEP.write_text(with_sweep_table(SWEEP.read_text(encoding="utf-8")), encoding="utf-8")
