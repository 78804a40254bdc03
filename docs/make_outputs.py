"""Makes the outputs and pictures in README.md and docs/ from real runs.

    python docs/make_outputs.py               all of them: about ten minutes on two cores
    python docs/make_outputs.py tutorial.md   those of one page
    python docs/make_outputs.py scaling.png   one picture; some are made only when they are named

A comment before a block of a page names the command whose output the block holds:

    <!-- output: ppo-cli runs . -->

Commands run in build/outputs, whose runs are used again while they are there. A command of ppo-cli
is the block's first line; what follows ` | ` in the comment shortens its output. Three commands are
this script's own: `python` stands for the Python code of the page up to the block, `screen RUN
STEP` for what a terminal shows at a step of a run, and `short` leaves out the prompts of `compare`
whose scores changed most.
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
    "no-penalty": "--seed 1 --steps 48 --set ppo.desired_kl=0.1 --set ppo.init_kl_coef=0 "
    "--set run.kl_ceiling=null --set run.kl_limit=null --set run.eval_every=16",
    "too-fast": "--seed 1 --steps 24 --set ppo.lr_scheduler_type=constant "
    "--set ppo.learning_rate=0.01 --set run.kl_limit=null --set run.on_divergence=stop",
}
"""Options of `ppo-cli train` for each run that the commands below and in the pages read."""

BEST_OF_N = "ppo-cli train --output ppo-good --resume --set 'run.best_of_n=[1,2,4,8,16]'"
REPORT = "ppo-cli compare ppo-good ppo-bad --samples 128 --html report.html"
PICTURE_OF = "python ../../tests/browser.py report.html"
PICTURES = {
    "training.png": "ppo-cli plot ppo-good ppo-bad --output training.png",
    "three-runs.png": "ppo-cli plot ppo-good no-penalty too-fast --output three-runs.png "
    "--metric env/reward_mean --metric objective/kl "
    "--metric ppo/policy/entropy --metric ppo/policy/clipfrac",
    "frontier.png": f"{BEST_OF_N} && "
    "ppo-cli plot --frontier ppo-good no-penalty --output frontier.png",
    "report.png": f"{REPORT} && {PICTURE_OF} report.png 1100 760",
    "report-dark.png": f"{REPORT} && {PICTURE_OF} report-dark.png 1100 760 --dark",
    "tutorial.png": "[ tutorial.png -nt tutorial.py ] || python tutorial.py",
}
"""The command that makes each picture."""

SHAPED = "ppo-cli train --config gpt2-imdb-shaped --steps 390 --set prompts.held_out=128"
MEASURED = {
    "scaling.png": "make -C ../.. scaling && cp ../../bench/scaling.png .",
    "frontier-reviews.png": " && ".join(
        [
            *(f"{SHAPED} --seed {seed} --output shaped-{seed}" for seed in range(3)),
            "ppo-cli train --config gpt2-imdb --set ppo.batch_size=64 --set "
            "ppo.mini_batch_size=64 --set ppo.learning_rate=3e-4 --steps 80 --output classic",
            "ppo-cli plot --frontier shaped-0 shaped-1 shaped-2 classic "
            "--output frontier-reviews.png",
        ]
    ),
}
"""Pictures that are made only when they are named: they need a quiet machine, or models and data
that are not part of the repository."""

MARKER = re.compile(
    r"^<!-- output: (?P<command>[^\n]+) -->\n(?P<fence>```\w*)\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PYTHON = "<!-- output: python -->"
BLOCK = re.compile(rf"^{PYTHON}$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = (
    "short() { sed '/^gained most/,/^means over/{s/^gained most.*/[...]\\n/;t;/^means over/!d}'; }"
)
END = "\f"
ERASE_LINE = "\x1b[2K"
CONTROL = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1"}
TOLD_TO_BE_PLAIN = {"NO_COLOR", "CI"}
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
    """Make a run unless it is there, with what it prints.

    `NAME.out` is its result, `NAME.screen` what it drew in the terminal, and `NAME.log` the same
    without control codes.
    """
    result = FOLDER / f"{name}.out"
    if result.exists():
        return
    print(f"training {name}", flush=True)
    command = f"ppo-cli train {RUNS[name]} --output {name} --overwrite > {name}.part"
    # A terminal of its own, so that the display is drawn. A run that diverges is one to show, too.
    run(f"script --quiet --command {shlex.quote(command)} {name}.screen > /dev/null", TERMINAL)
    if "\nended:" not in (FOLDER / name / "run.yaml").read_text(encoding="utf-8"):
        sys.exit(f"{name} did not end: see {FOLDER / name}.screen")
    log = CONTROL.sub("", (FOLDER / f"{name}.screen").read_text(encoding="utf-8"))
    (FOLDER / f"{name}.log").write_text(log.replace("\r", ""), encoding="utf-8")
    (FOLDER / f"{name}.part").rename(result)


def run(command: str, variables: Mapping[str, str] = PLAIN) -> str:
    """Run a command of the shell in the folder, and return what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {k: v for k, v in os.environ.items() if k not in TOLD_TO_BE_PLAIN}
    environment = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
    shell = ["bash", "-o", "pipefail", "-c", f"{SHORT}; {command}"]
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
