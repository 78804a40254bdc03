"""The command in processes of their own that begin with everything imported: real, but quick.

Each is forked from a server that has imported torch and the rest, so that it can be killed, stopped
and given faults like any other process without seconds of imports before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import free_port

Fault = Callable[[], None]
ROOT = Path(__file__).parents[1]


def server() -> ForkServerContext:
    """Makes processes that begin with what `tests/warm.py` did; one server for all of a worker."""
    context = multiprocessing.get_context("forkserver")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the server inherits these
    context.set_forkserver_preload(["tests.warm"])
    with contextlib.chdir(ROOT):  # where it finds the module, and is silent if it does not
        forkserver.ensure_running()
    return context


class Done(NamedTuple):
    """How a process ended; minus the number of the signal that killed it."""

    code: int
    out: str
    err: str


class Running:
    """A process that runs a command."""

    def __init__(
        self,
        arguments: tuple[Any, ...],
        cwd: Path,
        fault: Fault | None,
        stdin: str,
        program: str = "ppo-cli",
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="ppo-cli-streams-"))
        (folder / "in").write_text(stdin)
        self._streams = folder / "out", folder / "err"
        settings = ([program, *map(str, arguments)], cwd, self._streams, fault)
        self.process = server().Process(target=_run, args=settings)
        self.process.start()

    def wait(self, timeout: float = 300) -> Done:
        """How it ended; an end is made of it after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self._streams[1].read_text()}")
        texts = [path.read_text() if path.exists() else "" for path in self._streams]
        return Done(self.process.exitcode, *texts)


def start(
    *arguments: Any,
    cwd: Path,
    fault: Fault | None = None,
    stdin: str = "",
    program: str = "ppo-cli",
) -> Running:
    """Start `ppo-cli ARGUMENTS` in `cwd`; `fault` is called in the process first.

    Args:
        program: `ppo-cli` or `torchrun`.
    """
    return Running(arguments, cwd, fault, stdin, program)


def start_together(
    *arguments: Any, cwd: Path, fault: Fault | None = None, of: int = 1, processes: int = 2
) -> list[Running]:
    """Start it in several processes, as torchrun does; `fault` is called in number `of` alone."""
    port = free_port()
    return [
        start(*arguments, cwd=cwd, fault=partial(_member, i, processes, port, fault, of))
        for i in range(processes)
    ]


def _member(index: int, count: int, port: int, fault: Fault | None, of: int) -> None:
    variables = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    variables |= {"MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if fault is not None and index == of:
        fault()


def ppo_cli(*arguments: Any, cwd: Path, fault: Fault | None = None, stdin: str = "") -> Done:
    """Run `ppo-cli ARGUMENTS` in `cwd`."""
    return start(*arguments, cwd=cwd, fault=fault, stdin=stdin).wait()


def forking(fault: Fault | None = None, of: int = 1) -> None:
    """A fault for launchers: what they start is forked. `fault` is called in number `of` alone."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from ppo_cli.cli import launch

    Forked.fault, Forked.of = fault, of
    setattr(launch, "Popen", Forked)  # noqa: B010
    setattr(subprocess_handler, "Popen", Forked)  # noqa: B010


class Forked:
    """As much of `subprocess.Popen` as the launchers use, for `python -m ppo_cli ARGUMENTS`."""

    fault: Fault | None = None
    of = 1

    def __init__(
        self, args: Any, env: dict[str, str], start_new_session: bool = False, **_: Any
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        if start_new_session:
            os.setsid()
        os.environ.clear()
        os.environ.update(env)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["ppo-cli", *args[list(args).index("ppo_cli") + 1 :]]
        if self.fault is not None and int(env["RANK"]) == self.of:
            Forked.fault()
        from ppo_cli.cli import app

        app.main()

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("ppo-cli", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], cwd: Path, streams: tuple[Path, Path], fault: Fault | None) -> None:
    os.chdir(cwd)
    for name in ("CI", "NO_COLOR", "PPO_CLI_DEBUG"):
        os.environ.pop(name, None)
    for number, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdin = open(streams[0].with_name("in"))  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
    sys.argv = arguments
    sys.orig_argv = [sys.executable, "-m", "ppo_cli", *arguments[1:]]
    if fault is not None:
        fault()
    if arguments[0] == "torchrun":
        from torch.distributed import run

        run.main()
    else:
        from ppo_cli.cli import app

        app.main()
