"""Streams whose reader exits, that are closed or full; unusual terminals.

What belongs to the display ends no work; results that are lost for another reason are an error.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_cli.cli.console import is_plain, note
from ppo_cli.cli.display import LiveDisplay
from ppo_cli.evaluation.samples import Sample
from ppo_cli.reporting.summary import StepReport
from ppo_cli.training.checkpoint import find_damage
from tests import faults
from tests.conftest import SMALL_RUN
from tests.forked import Done, Fault, ppo_cli, start

QUICK = [
    "--config", SMALL_RUN, "--seed", 5, "--set", "run.eval_every=0",
    "--set", "rollout.output_min_length=4", "--set", "rollout.output_max_length=8",
]  # fmt: skip
STEPS = 2
TRAIN = ["train", "--output", "run", "--steps", STEPS, *QUICK]
GENERATE = ["generate", "embedded", "--no-score", "--max-new-tokens", 4]


def steps_made(folder: Path) -> list[int]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def assert_saved(folder: Path, steps: int = STEPS) -> None:
    """Check that the run has all its steps, its model and an undamaged last checkpoint."""
    assert steps_made(folder) == list(range(1, steps + 1))
    assert (folder / "run" / "model.safetensors").is_file()
    assert (folder / "run" / "README.md").is_file()
    assert not find_damage(folder / "run" / "checkpoints" / f"step-{steps:06}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run in it."""
    folder = tmp_path_factory.mktemp("home")
    done = ppo_cli(*TRAIN, cwd=folder)
    assert done.code == 0, done.err
    return folder


DISPLAY_FAULTS: dict[str, Fault] = {
    "the reader has left": partial(faults.no_reader, 1, 2),
    "the disk behind progress is full": partial(faults.full_disk_behind, 2),
    "the streams are closed": partial(faults.closed_streams, 0, 1, 2),
    "standard error is not for writing": partial(faults.read_only, 2),
}


@pytest.mark.parametrize("fault", DISPLAY_FAULTS.values(), ids=list(DISPLAY_FAULTS))
def test_no_fault_of_the_display_ends_a_run(fault: Fault, tmp_path: Path) -> None:
    assert ppo_cli(*TRAIN, cwd=tmp_path, fault=fault).code == 0
    assert_saved(tmp_path)


def test_a_broken_pipe_that_is_not_the_display_s_is_a_failure(tmp_path: Path) -> None:
    done = ppo_cli(*TRAIN, "--quiet", cwd=tmp_path, fault=faults.helper_leaves)
    assert done.code == 1
    assert "error: broken pipe" in done.err
    assert "\n         ppo-cli train --output run --resume\n" in done.err


RESULTS: list[list[Any]] = [
    ["stats", "run"],
    ["plot", "run", "--terminal"],
    ["--help"],
    [*GENERATE, "--format", "jsonl"],
    ["compare", "run", "--samples", 2, "--format", "json"],
]


@pytest.mark.parametrize("command", RESULTS, ids=lambda command: " ".join(map(str, command[:3])))
def test_results_may_be_read_in_part_but_not_be_lost(command: list[Any], home: Path) -> None:
    done = ppo_cli(*command, cwd=home, fault=partial(faults.no_reader, 1))
    said = ("sampling from ", "loading torch", "what a figure means: ")
    notes = [line for line in done.err.splitlines() if not line.startswith(said)]
    assert (done.code, notes) == (0, [])
    done = ppo_cli(*command, cwd=home, fault=partial(faults.full_disk_behind, 1))
    assert done.code == 1
    assert "error: standard output: No space left on device" in done.err
    assert "Exception ignored" not in done.err


def test_who_does_not_read_the_results_still_gets_the_verdict(home: Path) -> None:
    command = ["compare", "run", "--samples", 2, "--min-gap", 1000]
    assert ppo_cli(*command, cwd=home, fault=partial(faults.no_reader, 1)).code == 3


def test_streams_that_the_shell_closed(home: Path) -> None:
    def shell(redirections: str, *arguments: str, **extra: Any) -> Done:
        command = f'"$@" {redirections}'
        process = subprocess.run(
            ["sh", "-c", command, "sh", sys.executable, "-m", "ppo_cli", *arguments],
            cwd=home, capture_output=True, text=True, check=False, timeout=300, **extra,
        )  # fmt: skip
        return Done(process.returncode, process.stdout, process.stderr)

    whole = shell("", "config", "tiny")
    assert whole.code == 0 and len(whole.out) > 500
    assert shell("2>&-", "config", "tiny") == whole
    assert shell(">&- <&-", "config", "tiny") == Done(0, "", "")
    assert shell("2>&-", "config", os.fsdecode(b"no-\xff-such")).code == 2
    for unbuffered in ("", "1"):
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        lost = shell(">/dev/full", "config", "tiny", env=env)
        assert (lost.code, lost.err.count("\n")) == (1, 1), lost.err


def test_no_file_is_opened_as_a_stream_that_is_closed(tmp_path: Path) -> None:
    """Otherwise a C library that writes to descriptor 2 would write into it."""
    program = tmp_path / "program.py"
    program.write_text(
        "from ppo_cli.cli import streams\n"
        "streams.settle()\n"
        "print(open(__file__ + '.txt', 'w').fileno())\n"
    )
    command = f"{sys.executable} {program} 2>&- <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 2


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(tmp_path: Path) -> None:
    """Pipes made by a parent process in node are non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "ppo_cli", "config", "--schema"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    time.sleep(1.5)  # by now the pipe is full
    with os.fdopen(reader) as text:
        assert "properties" in json.load(text)
    assert process.wait() == 0
    process.communicate()


def test_closed_standard_input_holds_no_prompts(home: Path) -> None:
    command = ["generate", "run", "--no-score", "--prompts", "-"]
    done = ppo_cli(*command, cwd=home, fault=partial(faults.closed_streams, 0))
    assert done.code == 2
    assert "standard input holds no prompts" in done.err


class Terminal:
    """A pseudo-terminal that keeps what was written to it."""

    def __init__(self) -> None:
        self.master, self._slave = pty.openpty()
        self.name = os.ttyname(self._slave)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 4096):
                self.text += data.decode(errors="replace")
        except OSError:
            pass

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 60
        while not re.search(pattern, self.text) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert re.search(pattern, self.text), self.text

    def close(self) -> None:
        """Hang up."""
        os.close(self._slave)
        replacement = os.open(os.devnull, os.O_RDONLY)
        os.dup2(replacement, self.master)  # closes it, even while it is being read
        os.close(replacement)


def test_a_terminal_that_goes_stops_the_run_after_the_step_with_everything_saved(
    tmp_path: Path,
) -> None:
    terminal = Terminal()
    running = start(
        "train", "--output", "run", "--steps", 5000, *QUICK, cwd=tmp_path,
        fault=partial(faults.on_terminal, terminal.name),
    )  # fmt: skip
    terminal.wait_for(r"step \d+/5000")
    os.kill(running.process.pid or 0, signal.SIGHUP)  # the shell's, on top of the kernel's
    terminal.close()
    assert running.wait().code == 128 + signal.SIGHUP
    assert_saved(tmp_path, len(steps_made(tmp_path)))
    done = ppo_cli(
        "train", "--output", "run", "--resume", "--dry-run", "--no-measure", cwd=tmp_path
    )
    assert done.code == 0, done.err


def test_a_run_that_nohup_started_outlives_its_terminal(tmp_path: Path) -> None:
    terminal = Terminal()
    running = start(
        "train", "--output", "run", "--steps", 24, *QUICK, cwd=tmp_path,
        fault=partial(faults.on_terminal, terminal.name, nohup=True),
    )  # fmt: skip
    terminal.wait_for(r"step \d+/24")
    terminal.close()
    assert running.wait().code == 0
    assert_saved(tmp_path, 24)


@pytest.mark.parametrize("columns", ["abc", "", "0", "-5", "10", "1000000", "9" * 5000])
def test_columns_may_be_anything(columns: str, home: Path) -> None:
    fault = partial(faults.surroundings, COLUMNS=columns, LINES=columns)
    usual = ppo_cli("stats", "run", cwd=home)
    stats = ppo_cli("stats", "run", cwd=home, fault=fault)
    assert stats.code == 0, stats.err
    letters = Counter("".join(usual.out.split()))
    assert Counter("".join(stats.out.split())) == letters  # broken elsewhere, but nothing is cut
    chart = ppo_cli("plot", "run", "--terminal", cwd=home, fault=fault)
    assert chart.code == 0, chart.err
    assert chart.out.count("│") == 16


def test_columns_are_used(home: Path) -> None:
    widths = {}
    for columns in (60, 200):
        fault = partial(faults.surroundings, COLUMNS=str(columns))
        lines = ppo_cli("stats", "run", cwd=home, fault=fault).out.splitlines()
        widths[columns] = max(map(len, lines))
    assert widths[60] <= 60 < widths[200] <= 200


PROMPT = "café … 日本\nB"


def test_an_ascii_stream_has_rules_and_bars_of_its_own_and_text_as_escapes(home: Path) -> None:
    chart = ppo_cli("plot", "run", "--terminal", cwd=home, fault=faults.ascii_streams).out
    assert "\\" not in chart
    assert chart.count(" |") == 16 and f"+{'-' * STEPS}\n" in chart and "#" in chart
    command = [*GENERATE, "--prompt", PROMPT, "--format"]
    table = ppo_cli(*command, "table", cwd=home, fault=faults.ascii_streams).out
    assert r"caf\xe9 ... \u65e5\u672c\nB" in table
    assert "---" in ppo_cli("runs", ".", cwd=home, fault=faults.ascii_streams).out
    line = ppo_cli(*command, "jsonl", cwd=home, fault=faults.ascii_streams).out
    assert line.isascii()
    assert json.loads(line)["query"] == PROMPT
    output = home / "samples.jsonl"
    ppo_cli(*command, "jsonl", "--output", output, cwd=home, fault=faults.ascii_streams)
    assert "café … 日本" in output.read_text(encoding="utf-8")


FIGURES = {
    "env/reward_mean": (1.25, "+1.25"),
    "objective/kl": (12.34, "12.34"),
    "objective/kl_coef": (0.071, "0.071"),
    "ppo/loss/total": (-0.1234, "-0.1234"),
    "perf/tokens_per_second": (1234.0, "1,234"),
    "eval/score": (2.5, "+2.50"),
    "eval/probability": (0.75, "0.75"),
    "eval/kl": (9.87, "9.87"),
    "eval/distinct_2": (0.8, "0.80x"),
    "eval/perplexity": (3.0, "1.50x"),
}
HIDDEN_FIGURES = {
    "eval/reference_distinct_2": 1.0,
    "eval/reference_perplexity": 2.0,
    "time/step": 2.0,
    "time/sampling": 1.0,
    "time/scoring": 0.5,
    "time/optimising": 0.5,
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [120, 80, 66, 50, 33, 20, 12])
def test_the_live_display_shows_every_figure_at_every_width(width: int, encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    screen = Console(file=out, width=width, height=60, force_terminal=True, color_system=None)
    display = LiveDisplay(screen)
    stats = HIDDEN_FIGURES | {key: value for key, (value, _) in FIGURES.items()}
    sample = Sample("This film " * 20, "was good. " * 20, 1.5, 0.8)
    with display:
        display.show(StepReport(119, 200, stats | {"env/reward_mean": -0.5}, [sample]))
        display.show(StepReport(120, 200, stats, [sample], best=120))
    out.flush()
    assert isinstance(out.buffer, io.BytesIO)
    last = out.buffer.getvalue().decode(encoding).rpartition("step 120/200")[2]
    text = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", last)
    assert "-0.50" in text.split()  # of the first step, to see the improvement
    assert [shown for _, shown in FIGURES.values() if shown not in text.split()] == []
    for name in ("mean score", "tokens/s", "perplexity", "distinct-2", "50%/25%/25%", "left"):
        assert name in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert ("..." if encoding == "ascii" else "…") in text


@pytest.mark.parametrize(
    ("terminal", "variables", "plain"),
    [
        (True, {}, False),
        (False, {}, True),
        (True, {"NO_COLOR": "1"}, True),
        (True, {"NO_COLOR": ""}, False),
        (True, {"CI": "true"}, True),
        (True, {"TERM": "dumb"}, True),
    ],
)
def test_where_lines_are_plain(
    terminal: bool, variables: dict[str, str], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert is_plain(stream) is plain


def test_a_dumb_terminal_gets_lines_without_codes(tmp_path: Path) -> None:
    terminal = Terminal()
    fault = partial(faults.on_terminal, terminal.name, TERM="dumb")
    assert ppo_cli(*TRAIN, cwd=tmp_path, fault=fault).code == 0
    terminal.wait_for(rf"step {STEPS}/{STEPS} .* left\r\n")
    assert "\x1b" not in terminal.text
    terminal.close()


def test_notes_keep_their_lines_and_untrusted_text_stays_on_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note("go on with:", "  ppo-cli train --output 'a\nerror: b\x1b[2J'")
    assert capsys.readouterr().err == (
        "go on with:\n  ppo-cli train --output 'a⏎error: b\\x1b[2J'\n"
    )


def test_advice_after_an_interrupt_has_its_lines(tmp_path: Path) -> None:
    running = start("train", "--output", "run", "--steps", 5000, *QUICK, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running.process.pid or 0, signal.SIGINT)
    done = running.wait()
    assert done.code == 130
    assert "; go on with:\n  ppo-cli train --output run --resume\n" in done.err


def test_without_a_command_the_help_is_shown_as_it_is(tmp_path: Path) -> None:
    bare, asked = ppo_cli(cwd=tmp_path), ppo_cli("--help", cwd=tmp_path)
    assert (bare.code, bare.out, bare.err) == (2, "", asked.out)
    assert "\n  train " in bare.err


def test_what_matplotlib_has_to_say_is_not_shown(home: Path) -> None:
    (home / "日本語").symlink_to(home / "run")
    for arguments in (["日本語"], ["run", "--metric", "objective/kl"]):
        done = subprocess.run(
            [sys.executable, "-m", "ppo_cli", "plot", *arguments, "--output", "picture.png"],
            cwd=home,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": "/proc",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "MPLBACKEND": "module://no_such_notebook.backend_inline",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "picture.png\n", "")
        (home / "picture.png").unlink()


def test_a_program_that_runs_commands_settles_its_streams_once() -> None:
    program = (
        "import sys; from ppo_cli.cli import streams\n"
        "streams.settle(); settled = sys.stdout, sys.stderr\n"
        "streams.settle(); assert settled == (sys.stdout, sys.stderr)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdin=subprocess.DEVNULL)
