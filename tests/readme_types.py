"""Type-checks the Python examples of the documents with mypy, as a user of the package would.

The examples of a document are one module, in which each has its own line numbers: an example may go
on from the one before it, and an error names the document's line.

    python tests/readme_types.py             the README and all of docs/
    python tests/readme_types.py FILE.md...
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    usual = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    documents = [Path(name).resolve() for name in sys.argv[1:]] or usual
    with tempfile.TemporaryDirectory() as folder:
        modules = {}
        for number, document in enumerate(documents):
            if code := examples(document.read_text(encoding="utf-8")):
                modules[f"document_{number}.py"] = os.path.relpath(document)
                (Path(folder) / f"document_{number}.py").write_text(code, encoding="utf-8")
        if not modules:
            raise SystemExit("no Python example in the documents")
        sys.exit(check(Path(folder), modules))


def examples(markdown: str) -> str:
    """The code of the ```python blocks, each line at its own number; "" where there are none."""
    lines, indent = [], None
    for line in markdown.splitlines():
        fence = re.match(r"(\s*)(```+|~~~+)\s*(\w*)", line)
        if fence:
            lines.append("")
            opens = indent is None and fence[3] in ("python", "py")
            indent = fence[1] if opens else None
        else:
            lines.append("" if indent is None else line.removeprefix(indent))
    return "\n".join(lines) + "\n" if any(lines) else ""


def check(folder: Path, modules: dict[str, str]) -> int:
    """mypy's exit code; its messages name documents."""
    (folder / "mypy.ini").write_text(
        "[mypy]\nallow_redefinition = true\nignore_missing_imports = true\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache" / "documents"]
    done = subprocess.run([*command, *modules], cwd=folder, capture_output=True, text=True)
    shown = done.stdout + done.stderr
    for module, document in modules.items():
        shown = shown.replace(module, document)
    print(shown, end="")
    return done.returncode


if __name__ == "__main__":
    main()
