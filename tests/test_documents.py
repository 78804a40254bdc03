"""The documents: links, named functions and tables of keys agree with what is there.

`python tests/test_documents.py`, as `python docs/references.py`, writes the tables that are made
from the code anew.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.config.schema import RunConfig, json_schema
from ppo_cli.config.sweep import sweep_schema

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/benchmarks/*.md")})
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`([\w.]+)(?:\(\))?` in \[`?[^\]]+`?\]\(([^)\s]+\.py)\)")
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]


def load(file: Path) -> Any:
    """A file outside the packages as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


references = load(ROOT / "docs" / "references.py")


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
    assert sorted(explained) == sorted(references.all_statistics())


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_what_is_made_from_the_code_is_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == references.with_references(text), "write it anew: python docs/references.py"

    schema = json.loads(json_schema())
    sweep = json.loads(sweep_schema())
    schema["$defs"] |= {"sweep": sweep, **sweep["$defs"]}
    described = [
        (f"{name}.{key}", "description" in value)
        for name, section in schema["$defs"].items()
        for key, value in section.get("properties", {}).items()
    ]
    assert len(described) > 150
    assert [key for key, is_described in described if not is_described] == []
    sections = schema["properties"].items()
    assert [key for key, value in sections if "description" not in value] == []


def test_every_page_is_in_the_contents() -> None:
    listed = LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"}
    assert sorted(pages - set(listed)) == []


def test_a_page_becomes_one_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    conf = load(ROOT / "docs" / "conf.py")
    repository = f"{conf.REPOSITORY}/blob/HEAD"
    links = {
        "../ppo_cli/core.py": f"{repository}/ppo_cli/core.py",
        "../CONTRIBUTING.md": "contributing.md",
        "training.md": "training.md",
        "https://example.org": "https://example.org",
    }
    assert {target: conf.place(ROOT / "docs", target) for target in links} == links
    assert conf.place(ROOT, "docs/training.md") == "training.md"
    picture = (
        '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="a-dark.png">\n'
        '  <img alt="Loss" src="a.png">\n</picture>'
    )
    found = conf.PICTURE.search(picture)
    shown = conf.pictures(**found.groupdict())
    assert re.findall(r"\{image\} (\S+)\n:class: (\S+)\n:alt: Loss", shown) == [
        ("a.png", "only-light"),
        ("a-dark.png", "only-dark"),
    ]
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [caption for caption, _ in conf.SECTION.findall(index)] == re.findall(
        r"^## (.+)$", index, re.MULTILINE
    )


KEY = re.compile(r"`(policy|prompts|rollout|reward|ppo|run)\.(?!(?:yaml|py|json)\b)([a-z_]+)\b")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_key_that_a_page_names_is_there(page: Path) -> None:
    known = {name: set(vars(getattr(RunConfig(), name))) for name in RunConfig.model_fields}
    found = KEY.findall(page.read_text(encoding="utf-8"))
    assert [f"{section}.{key}" for section, key in found if key not in known[section]] == []


if __name__ == "__main__":
    references.main()
