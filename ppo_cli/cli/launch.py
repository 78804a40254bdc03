"""`train --num-processes`: starts the processes of a run on this machine, and ends as they end.

`torchrun` would end the others as soon as one fails, before the main process has said why, has exit
code 1 for every failure, and gives a run that is to stop 30 seconds to save itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen
from types import FrameType

from ppo_cli.cli.signals import handling
from ppo_cli.errors import PPOCliError
from ppo_cli.utils.launcher import OURS, usable_cores

GRACE = 15.0  # seconds that the others have to end by themselves where one has failed
PAUSE = 0.05  # seconds between two looks at the processes
Member = Popen[bytes]


def launch(count: int) -> int:
    """Start this command in `count` processes and wait for their end.

    Returns:
        The exit code of the run.

    Raises:
        PPOCliError: the main process was killed, so that it could not say how the run ended.
    """
    members: list[Member] = []
    with _reserved_port() as port, _passed_on(members) as passed:
        try:
            for index in range(count):
                members.append(_start(index, count, port))
            ended = _wait(members)
        finally:
            for member in members:
                member.kill()
    # The main process knows how the run ended. Where it was killed, it could not say so.
    code = next(filter(None, (ended[i] for i in range(count) if i in ended)), 0)
    if 0 not in ended or (ended[0] < 0 and -ended[0] not in passed):
        index = next(iter(ended))
        error = PPOCliError(
            f"process {index} of this run {_end(ended[index])}, and the others were stopped; "
            "--resume goes on from the newest checkpoint, if there is one"
        )
        error.exit_code = 128 - code if code < 0 else code
        raise error
    return 128 - code if code < 0 else code


def stop_with_launcher() -> None:
    """Have this process get SIGTERM when the one that started it dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _start(index: int, count: int, port: int) -> Member:
    variables = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        OURS: os.getpid(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or max(usable_cores() // count, 1),
    }
    surroundings = os.environ | {name: str(value) for name, value in variables.items()}
    return Popen([sys.executable, *sys.orig_argv[1:]], env=surroundings)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port, which the system gives to nobody else meanwhile.

    The main process can listen there: a socket that does not listen stands in nobody's way.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextmanager
def _passed_on(members: Sequence[Member]) -> Iterator[set[int]]:
    """Send signals to this process on to the processes; collect their numbers."""
    passed: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.add(number)
        for member in members:
            member.send_signal(number)

    with handling(pass_on):
        yield passed


def _wait(members: Sequence[Member]) -> dict[int, int]:
    """The exit codes of the processes, in the order in which they ended.

    Those that go on after one has failed, or after the main process, are left out.
    """
    ended: dict[int, int] = {}
    deadline = float("inf")
    while len(ended) < len(members) and time.monotonic() < deadline:
        for index, member in enumerate(members):
            if index not in ended and (code := member.poll()) is not None:
                ended[index] = code
                if code or index == 0:
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(PAUSE)
    return ended


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed ({signal.Signals(-code).name})"
