"""Runs the tests with the lowest and the newest versions that are allowed, and prints a table.

    python tests/matrix.py                                   all tests, on each Python that is there
    python tests/matrix.py --versions lowest tests/ppo       some, with the lowest alone
    python tests/matrix.py --pin torch==2.13.0               with this build of torch in each cell

Each cell has a virtual environment of its own below .matrix/, with the log of what was done. A cell
that cannot be installed has failed, and the table says why.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"
SHOWN = ["torch", "transformers", "trl", "datasets", "peft"]
VERSIONS = ["lowest", "newest"]


@dataclass
class Cell:
    """One Python with one choice of versions, and what became of it."""

    python: str
    versions: str
    packages: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0
    problem: str = ""

    @property
    def is_good(self) -> bool:
        return not self.problem and self.passed > 0 and self.failed == 0


def main() -> None:
    options = arguments()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = find_pythons(options.python, SpecifierSet(project["requires-python"]))
    if not pythons:
        raise SystemExit(f"there is no Python {project['requires-python']} here")
    cells = []
    for version, python in pythons.items():
        for versions in options.versions:
            cells.append(Cell(version, versions))
            pins = [*options.pin, *(lowest(project, options.pin) if versions == "lowest" else [])]
            fill(cells[-1], python, pins, options)
    print(table(cells))
    sys.exit(0 if all(cell.is_good for cell in cells) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("paths", nargs="*", help="tests to run (default: all)")
    add("--versions", nargs="+", choices=VERSIONS, default=VERSIONS)
    add("--python", action="append", default=[], metavar="COMMAND", help="instead of those found")
    add("--pin", action="append", default=[], metavar="NAME==VERSION", help="in each cell")
    add("--installer", choices=["pip", "uv"], default="pip")
    add("--workers", default="2", help="of pytest (default: 2)")
    return parser.parse_args()


def find_pythons(asked: list[str], allowed: SpecifierSet) -> dict[str, str]:
    """Version -> command of each Python that runs and is allowed; a command may be a dead shim."""
    ask = "import platform, sys; print(platform.python_version(), sys.executable)"
    found: dict[str, str] = {}
    for command in asked or [sys.executable, *(f"python3.{minor}" for minor in range(8, 30))]:
        if not (path := shutil.which(command)):
            continue
        done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
        version, _, executable = done.stdout.strip().partition(" ")
        minor = version.rpartition(".")[0]
        if done.returncode == 0 and version in allowed and minor not in found:
            found[minor] = executable
    return found


def lowest(project: dict, pinned: Iterable[str]) -> list[str]:
    """Each lower bound of what is installed, as `name==version`; not of what is pinned anyway."""
    taken = {Requirement(one).name for one in pinned}
    written = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = [Requirement(one) for one in written]
    return [
        f"{one.name}=={bound.version}"
        for one in requirements
        for bound in one.specifier
        if bound.operator == ">=" and one.name not in taken
    ]


def fill(cell: Cell, python: str, pins: list[str], options: argparse.Namespace) -> None:
    """Install the cell's versions and run the tests with them."""
    folder = FOLDER / f"{cell.python}-{cell.versions}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"Python {cell.python}, {cell.versions}: see {folder}", file=sys.stderr)
    start = time.monotonic()
    cell.problem = install(folder, python, pins, options.installer)
    if not cell.problem:
        cell.packages = installed(folder)
        cell.problem = run_tests(cell, folder, options)
    cell.seconds = time.monotonic() - start


def install(folder: Path, python: str, pins: list[str], installer: str) -> str:
    """ "" once the project and its tests' packages are installed, otherwise why they are not."""
    (folder / "pins.txt").write_text("".join(f"{one}\n" for one in pins))
    venv = subprocess.run([python, "-m", "venv", folder / "env"], capture_output=True, text=True)
    if venv.returncode:
        return last_line(venv.stdout + venv.stderr)
    inside = str(folder / "env" / "bin" / "python")
    tool = ["uv", "pip", "install", "--python", inside]
    if installer == "pip":
        tool = [inside, "-m", "pip", "install", "--disable-pip-version-check"]
    command = [*tool, "-c", str(folder / "pins.txt"), "-e", f"{ROOT}[dev]"]
    with (folder / "install.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return "" if done.returncode == 0 else why_not((folder / "install.log").read_text())


def why_not(log: str) -> str:
    """What an installer says of requirements that cannot be met."""
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if line.startswith(("ERROR:", "error:", "×", "╰"))]
    bounds = [line for line in lines if re.search(r"(depends on|requested) .*[<>=]", line)]
    return "; ".join([*said[:1], *bounds]) or last_line(log)


def installed(folder: Path) -> dict[str, str]:
    ask = f"from importlib.metadata import version as v; [print(v(n)) for n in {SHOWN!r}]"
    done = subprocess.run(
        [folder / "env" / "bin" / "python", "-c", ask], capture_output=True, text=True, check=True
    )
    return dict(zip(SHOWN, done.stdout.split(), strict=True))


def run_tests(cell: Cell, folder: Path, options: argparse.Namespace) -> str:
    """Count the cell's tests; "" unless pytest did not get to run them."""
    report = folder / "report.xml"
    command = [folder / "env" / "bin" / "python", "-m", "pytest", "-q", "-n", options.workers]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *options.paths]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (folder / "pytest.log").open("w") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if not report.exists():
        return f"pytest: {last_line((folder / 'pytest.log').read_text())}"
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        cell.failed += counts["failures"] + counts["errors"]
        cell.skipped += counts["skipped"]
        cell.passed += counts["tests"] - sum(list(counts.values())[1:])
    return "" if done.returncode in (0, 1) else f"pytest ended with {done.returncode}"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]


def table(cells: list[Cell]) -> str:
    """A Markdown table of the cells, and below it what went wrong."""
    rows = [["Python", "versions", *SHOWN, "passed", "failed", "skipped", "seconds"]]
    for cell in cells:
        counts = [str(cell.passed), str(cell.failed), str(cell.skipped)]
        if cell.problem:
            counts = ["-", "failed", "-"]
        packages = [cell.packages.get(name, "-") for name in SHOWN]
        rows.append([cell.python, cell.versions, *packages, *counts, f"{cell.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    lines += [f"{cell.python}, {cell.versions}: {cell.problem}" for cell in cells if cell.problem]
    return "\n".join(["", *lines])


if __name__ == "__main__":
    main()
