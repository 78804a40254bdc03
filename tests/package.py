"""Builds wheel and sdist into dist/, checks what they hold, installs the wheel and uses it.

The wheel goes into an environment of its own, which sees the packages of this one but not the
project: so it takes seconds, and what the wheel lacks is missed.

    python tests/package.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}"
PACKAGE = PROJECT["name"].replace("-", "_")
SMALL = [
    *("rollout.output_min_length=4", "rollout.output_max_length=8"),
    *("prompts.limit=16", "prompts.held_out=4"),
    *("ppo.batch_size=4", "ppo.mini_batch_size=4", "ppo.ppo_epochs=1"),
]
"""Settings of a training step that takes a moment."""


def main() -> None:
    wheel, sdist = build(ROOT / "dist")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as folder:
        use(install(wheel, Path(folder) / "env"), Path(folder) / "empty")
    print(f"{wheel.name} and {sdist.name} are whole, and the wheel works")


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist of the project, and the wheel that is made from it."""
    wheel, sdist = folder / f"{NAME}-py3-none-any.whl", folder / f"{NAME}.tar.gz"
    for old in (wheel, sdist):
        old.unlink(missing_ok=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    expected = {f"{PACKAGE}/{name}": data for name, data in files(ROOT / PACKAGE).items()}
    expected |= {
        f"{PACKAGE}/configs/{name}": data for name, data in files(ROOT / "configs").items()
    }
    info = f"{NAME}.dist-info/"
    code = {name: data for name, data in held.items() if not name.startswith(info)}
    refuse("missing in the wheel", expected.keys() - code.keys())
    refuse("strange in the wheel", code.keys() - expected.keys())
    require(code == expected, "a file of the wheel is not the one of the checkout")
    for ending in ("/py.typed", "/BUILD.json", ".safetensors", ".yaml", ".html", ".css", ".js"):
        require(any(name.endswith(ending) for name in code), f"no *{ending} in the wheel")
    require(f"{info}licenses/LICENSE" in held, "the wheel has no licence")
    check_metadata(Parser().parsestr(held[f"{info}METADATA"].decode()))


def check_metadata(metadata: Message) -> None:
    """What a package index shows."""
    require(metadata["Requires-Python"] == PROJECT["requires-python"], "another Requires-Python")
    labels = {value.split(",")[0] for value in metadata.get_all("Project-URL", [])}
    require(labels == set(PROJECT["urls"]), f"other addresses: {sorted(labels)}")
    description = metadata.get_payload()
    require("\n## " in description, "the long description is not the README")
    refuse("links of the long description that lead nowhere", relative_links(description))
    linked = re.findall(
        rf"{re.escape(PROJECT['urls']['Repository'])}/(?:blob|raw)/HEAD/([^)#\s]+)", description
    )
    require(any(name.endswith(".png") for name in linked), "no picture in the long description")
    refuse("the README links to what is not there", (x for x in linked if not (ROOT / x).exists()))


def relative_links(markdown: str) -> list[str]:
    """Targets of links and pictures that mean nothing outside the repository."""
    targets = re.findall(r"\]\(([^)\s]+)", markdown)
    targets += re.findall(r"""(?:src|href)=["']([^"']+)""", markdown)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*(\S+)", markdown, re.MULTILINE)
    return [one for one in targets if not re.match(r"https?://|mailto:|#", one)]


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {one.name.removeprefix(f"{NAME}/") for one in archive.getmembers() if one.isfile()}
    expected = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}
    expected |= {"SECURITY.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "PKG-INFO"}
    for folder in (PACKAGE, "configs", "docs", "examples", "tests"):
        expected |= {f"{folder}/{name}" for name in files(ROOT / folder)}
    refuse("missing in the sdist", expected - held)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` that git would keep, by its relative name."""
    shown = run("git", "-C", folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = [name for name in shown.split("\0") if name and (folder / name).exists()]
    return {name: (folder / name).read_bytes() for name in names}


def install(wheel: Path, environment: Path) -> Path:
    """The folder of commands of a new environment that holds the wheel."""
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    place = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", place))
    # A line of a .pth file is a folder whose own .pth files are not read: an editable install of
    # the project stays out of sight.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "shared.pth").write_text("\n".join(sorted(shared)))
    commands = Path(sysconfig.get_path("scripts", "venv", place))
    pip = [sys.executable, "-m", "pip", "--python", commands / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(*pip, "check")  # what the wheel asks for, against what is there
    return commands


def use(commands: Path, empty: Path) -> None:
    """Run the installed command where nothing of the checkout is in reach."""
    empty.mkdir()
    where = run(commands / "python", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", at=empty)
    require(Path(where.strip()).is_relative_to(commands.parent), f"imported from {where}")
    command = commands / PROJECT["name"]
    require(PROJECT["version"] in run(command, "--version", at=empty), "another --version")
    for name in files(ROOT / "configs"):
        if "/" in name:  # not of a run, but for accelerate
            continue
        require(Path(name).stem in run(command, "config", at=empty), f"`config` lacks {name}")
        run(command, "config", Path(name).stem, at=empty)
    settings = [part for setting in SMALL for part in ("--set", setting)]
    run(command, "train", "--steps", "1", "--quiet", "--output", "run", *settings, at=empty)
    require((empty / "run" / "model.safetensors").exists(), "training left no model")


def run(*command: str | Path, at: Path = ROOT) -> str:
    """The standard output of a command that has to succeed."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=at, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        shown = " ".join(str(part) for part in command)
        raise SystemExit(f"{shown}\n{done.stdout}{done.stderr}exit code {done.returncode}")
    return done.stdout


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def refuse(what: str, names: Iterable[str]) -> None:
    if found := sorted(names):
        raise SystemExit(f"{what}: {', '.join(found[:10])}{' ...' if found[10:] else ''}")


if __name__ == "__main__":
    main()
