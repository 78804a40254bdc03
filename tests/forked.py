"""The command in processes of their own that begin with everything imported: real, but quick.

Each is forked from a server that has imported torch and the rest, so that it can be killed, stopped
and given faults like any other process without seconds of imports before.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Fault = Callable[[], None]
IMPORTED = [
    "matplotlib.backends.backend_agg",
    "ppo_cli.cli.app",
    "ppo_cli.cli.display",
    "ppo_cli.data.embedded.grammar",
    "ppo_cli.training.build",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.gpt2.modeling_gpt2",
]


class Done(NamedTuple):
    """How a process ended; minus the number of the signal that killed it."""

    code: int
    out: str
    err: str


class Running:
    """A process that runs a command."""

    def __init__(
        self, arguments: tuple[Any, ...], cwd: Path, fault: Fault | None, stdin: str
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="ppo-cli-streams-"))
        (folder / "in").write_text(stdin)
        self._streams = folder / "out", folder / "err"
        context = multiprocessing.get_context("forkserver")
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the server inherits these
        context.set_forkserver_preload(IMPORTED)
        settings = ([str(a) for a in arguments], cwd, self._streams, fault)
        self.process = context.Process(target=_run, args=settings)
        self.process.start()

    def wait(self, timeout: float = 300) -> Done:
        """How it ended; an end is made of it after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self._streams[1].read_text()}")
        texts = [path.read_text() if path.exists() else "" for path in self._streams]
        return Done(self.process.exitcode, *texts)


def start(*arguments: Any, cwd: Path, fault: Fault | None = None, stdin: str = "") -> Running:
    """Start `ppo-cli ARGUMENTS` in `cwd`; `fault` is called in the process first."""
    return Running(arguments, cwd, fault, stdin)


def ppo_cli(*arguments: Any, cwd: Path, fault: Fault | None = None, stdin: str = "") -> Done:
    """Run `ppo-cli ARGUMENTS` in `cwd`."""
    return start(*arguments, cwd=cwd, fault=fault, stdin=stdin).wait()


def _run(arguments: list[str], cwd: Path, streams: tuple[Path, Path], fault: Fault | None) -> None:
    os.chdir(cwd)
    for name in ("CI", "NO_COLOR", "PPO_CLI_DEBUG"):
        os.environ.pop(name, None)
    for number, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdin = open(streams[0].with_name("in"))  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
    sys.argv = ["ppo-cli", *arguments]
    if fault is not None:
        fault()
    from ppo_cli.cli import app

    app.main()
