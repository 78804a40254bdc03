"""The site: docs/*.md by Sphinx. `make docs` builds it into build/docs; warnings are errors.

The pages are Markdown that reads well where it stands. What a site needs besides is added here
while a page is read: tables made from the code, links out of docs/, pictures for dark pages, and
the tables of contents, which are the lists of index.md.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]  # the package of this checkout, whichever is installed
os.environ["HF_HUB_OFFLINE"] = "1"

from docutils import nodes  # noqa: E402
from docutils.utils.math import latex2mathml  # noqa: E402
from references import with_references  # noqa: E402
from sphinx.util import logging  # noqa: E402

import ppo_cli  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = author = "ppo-cli"
version = release = ppo_cli.__version__
copyright = "the authors of ppo-cli, Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
highlight_language = "text"
smartquotes = False  # they make one dash of --
default_role = "py:obj"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
# What other packages define, and what of this one has no page.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "ppo-cli"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_favicon = "_static/icon.svg"
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "HEAD",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view"],
    "light_css_variables": {
        "color-brand-primary": "#0b5fa5",
        "color-brand-content": "#0b5fa5",
        "color-brand-visited": "#6b4fa0",
    },
    "dark_css_variables": {
        "color-brand-primary": "#6fb7f2",
        "color-brand-content": "#6fb7f2",
        "color-brand-visited": "#b9a2e8",
    },
}
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"

linkcheck_ignore = [rf"{REPOSITORY}/(blob|tree)/HEAD/"]  # they are files of this checkout

ELSEWHERE = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "measurements": "tests/benchmarks/NOTES.md",
    "study": "tests/benchmarks/STUDY.md",
}
"""Pages whose text stands outside docs/."""
TARGET = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img (?=[^>]*src="(?P<light>[^"]+)")(?=[^>]*alt="(?P<alt>[^"]*)")[^>]*>\s*</picture>'
)
SHELL = re.compile(r"^```\n(?=(?:\$ )?(?:ppo-cli|pip|make|git|export|torchrun|accelerate) )", re.M)
NAME = re.compile(r'(?<=<td><p><code class="docutils literal notranslate"><span class="pre">)[^<]+')
ACCENT = re.compile(r"(\\(?:hat|bar|tilde)\{[^{}]*\})(?=[_^])")
WORDS = re.compile(r"(?<=[._/])(?=\w)")
SECTION = re.compile(r"^## (.+)\n\n((?:- .*\n(?:  .*\n)*)+)", re.MULTILINE)


def read(app: Any, name: str, source: list[str]) -> None:
    """Make of a page as it stands in the repository one of the site."""
    file = ROOT / ELSEWHERE.get(name, f"docs/{name}.md")
    app.env.note_dependency(file)
    text = file.read_text(encoding="utf-8")
    text = with_references(text)
    text = PICTURE.sub(lambda found: pictures(**found.groupdict()), text)
    text = TARGET.sub(lambda found: place(file.parent, found[1]) + (found[2] or ""), text)
    text = SHELL.sub("```sh\n", text)
    if name == "index":
        text += "".join(contents(*found) for found in SECTION.findall(text))
    source[0] = text


def place(folder: Path, target: str) -> str:
    """Where a link from a page in `folder` leads on the site: to a page, or into the repository."""
    if "://" in target or target.startswith("mailto:"):
        return target
    path = (folder / target).resolve()
    inside = path.relative_to(ROOT).as_posix()
    for page, file in ELSEWHERE.items():
        if inside == file:
            return f"{page}.md"
    if path.parent == DOCS:
        return path.name
    if not path.exists():
        return target  # Sphinx says so
    return f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/HEAD/{inside}"


def pictures(light: str, dark: str, alt: str) -> str:
    """A picture for each theme; the theme may be chosen on the page, so the browser cannot."""
    both = {"only-light": light, "only-dark": dark}
    return "\n\n".join(
        f"```{{image}} {file}\n:class: {theme}\n:alt: {alt}\n```" for theme, file in both.items()
    )


def contents(caption: str, links: str) -> str:
    """A part of the tables of contents, from a list of index.md."""
    pages = re.findall(r"\]\((\w[\w-]*)\.md\)", links)
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```", ""])


def mark_tables(app: Any, doctree: Any) -> None:
    """Mark the tables of keys and options: a phone shows their cells below each other."""
    for table in doctree.findall(nodes.table):
        if next(table.findall(nodes.entry)).astext() in ("key", "option", "argument"):
            table["classes"].append("keys")


def finish(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give a page its first paragraph as its description, and mend what the theme leaves open."""
    for paragraph in doctree.findall(nodes.paragraph) if doctree else ():
        text = shorten(paragraph.astext(), 160, placeholder=" ...")
        context["metatags"] += f'<meta name="description" content="{escape(text)}" />'
        break
    if tree := context.get("furo_navigation_tree"):
        context["furo_navigation_tree"] = tree.replace(
            'role="heading"', 'role="heading" aria-level="2"'
        )
    if "body" in context:  # long names in tables may break where words end
        body = context["body"].replace("</strong> -- ", "</strong> – ")  # of parameters
        context["body"] = NAME.sub(lambda found: WORDS.sub("<wbr>", found[0]), body)


def show_math(self: Any, node: Any, block: bool = False) -> None:
    """MathML, which browsers draw themselves: no script, and none from another server."""
    formula = node.astext().replace(r"\dots", r"\ldots")
    formula = ACCENT.sub(r"\1{}", formula)  # else what is below an accent is set below the letter
    try:
        self.body.append(latex2mathml.tex2mathml(formula, as_block=block))
    except Exception as error:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.connect("source-read", read)
    app.connect("doctree-read", mark_tables)
    app.connect("html-page-context", finish, priority=900)  # after the theme
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(show_math, None),
        block_renderers=(lambda self, node: show_math(self, node, block=True), None),
    )
