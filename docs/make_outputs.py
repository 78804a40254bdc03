"""Makes the outputs and pictures in README.md and docs/ from real runs.

    python docs/make_outputs.py               all of them: about ten minutes on two cores
    python docs/make_outputs.py tutorial.md   those of one page
    python docs/make_outputs.py scaling.png   one picture; some are made only when they are named

A comment before a block of a page names the command whose output the block holds:

    <!-- output: ppo-cli runs . -->

Commands run in build/outputs, whose runs are used again while they are there. A command of ppo-cli
is the block's first line; what follows ` | ` in the comment shortens its output. Two commands are
this script's own: `python` stands for the Python code of the page up to the block, and `screen RUN
STEP` for what a terminal shows at a step of a run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
FOLDER = ROOT / "build" / "outputs"

RUNS = {
    "ppo-good": "--sentiment positive --seed 1",
    "ppo-bad": "--sentiment negative --seed 1",
}
"""Options of `ppo-cli train` for each run directory that a command below or in a page reads."""

PICTURES = {
    "training.png": "ppo-cli plot ppo-good ppo-bad --output training.png",
    "tutorial.png": "[ tutorial.png -nt tutorial.py ] || python tutorial.py",
}
"""The command that makes each picture."""

MEASURED = {
    "scaling.png": "make -C ../.. scaling && cp ../../bench/scaling.png .",
}
"""Pictures that are made only when they are named: they need a quiet machine, or other models."""

MARKER = re.compile(
    r"^<!-- output: (?P<command>.+) -->\n(?P<fence>```\w*)\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PYTHON = "<!-- output: python -->"
BLOCK = re.compile(rf"^{PYTHON}$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END = "\f"
ERASE_LINE = "\x1b[2K"
CONTROL = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1"}
TERMINAL = {"COLUMNS": "80", "TERM": "xterm"}


def main() -> None:
    """Make what the arguments name, or everything."""
    names = sys.argv[1:]
    known = {*PICTURES, *MEASURED, *(page.name for page in PAGES)}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no page or picture {unknown[0]!r}: choose among {', '.join(sorted(known))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        write_program(page)
    with ThreadPoolExecutor(max_workers=2) as pool:  # a core each
        list(pool.map(train, RUNS))
    for page in PAGES:
        if page.name in (names or IDS):
            text = page.read_text(encoding="utf-8")
            page.write_text(with_outputs(text, page.name), encoding="utf-8")
    for name, command in (PICTURES | MEASURED).items():
        if name in (names or PICTURES):
            print(f"{name}: {command}", flush=True)
            run(command)
            shutil.copyfile(FOLDER / name, ROOT / "docs" / name)


def train(name: str) -> None:
    """Make a run unless it is there; `NAME.out` and `NAME.screen` are what it prints."""
    result = FOLDER / f"{name}.out"
    if result.exists():
        return
    print(f"training {name}", flush=True)
    command = f"ppo-cli train {RUNS[name]} --output {name} --overwrite > {name}.part"
    # A terminal of its own, so that the display is drawn. A run that diverges is one to show, too.
    run(f"script --quiet --command {shlex.quote(command)} {name}.screen > /dev/null", TERMINAL)
    if "\nended:" not in (FOLDER / name / "run.yaml").read_text(encoding="utf-8"):
        sys.exit(f"{name} did not end: see {FOLDER / name}.screen")
    (FOLDER / f"{name}.part").rename(result)


def run(command: str, variables: Mapping[str, str] = PLAIN) -> str:
    """Run a command of the shell in the folder, and return what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=FOLDER, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def with_outputs(text: str, name: str) -> str:
    """A page with what its commands print today."""
    printed = iter(run(f"python {Path(name).stem}.py").split(END) if PYTHON in text else ())

    def block(found: re.Match[str]) -> str:
        command = found["command"]
        print(f"{name}: {command}", flush=True)
        shown = next(printed) if command == "python" else output(command)
        lines = [line.rstrip() for line in shown.strip("\n").splitlines()]
        return "\n".join([f"<!-- output: {command} -->", found["fence"], *lines, "```"])

    return MARKER.sub(block, text)


def output(command: str) -> str:
    """What a command prints, below the command itself if it is one of ppo-cli."""
    kind, *arguments = command.split()
    if kind == "screen":
        return screen(*arguments)
    head = f"$ {command.partition(' | ')[0]}\n" if kind == "ppo-cli" else ""
    return head + run(command)


def screen(name: str, step: str) -> str:
    """What the terminal showed after a step of a run: the display is drawn anew each time."""
    frames = (FOLDER / f"{name}.screen").read_text(encoding="utf-8").split(ERASE_LINE)
    frame = next(frame for frame in frames if f"step {step}/" in CONTROL.sub("", frame))
    return CONTROL.sub("", frame).replace("\r", "")


def write_program(page: Path) -> None:
    """Write the Python code of a page to the folder; it prints END at each of its outputs."""
    text = page.read_text(encoding="utf-8")
    if PYTHON in text:
        (FOLDER / page.stem).with_suffix(".py").write_text(program(text), encoding="utf-8")


def program(text: str) -> str:
    """The Python code of a page."""
    return "\n".join(found[1] or f"print({END!r}, end='')" for found in BLOCK.finditer(text))


if __name__ == "__main__":
    main()
