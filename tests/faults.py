"""Faults for a process to start with: kills and full disks at a write, steps that go wrong.

Each is called in the process before the command; `functools.partial` gives it its arguments.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}


def before_writes(act: Callable[[str, str], None]) -> None:
    """Call `act` with event and path before each change of a file or folder below here."""
    home = os.getcwd() + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or isinstance(arguments[0], int):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.path.join(home, os.fsdecode(arguments[0]))
        if path.startswith(home):
            act(event, path.removeprefix(home))

    sys.addaudithook(hook)


def kill_at_write(number: int) -> None:
    """SIGKILL before the `number`-th change of a file or folder."""
    seen = 0

    def count(*_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    before_writes(count)


def list_writes(file: str) -> None:
    """Write the path of each change of a file or folder into `file`, which lies elsewhere."""
    out = open(file, "w", buffering=1)  # noqa: SIM115
    before_writes(lambda _, path: print(path, file=out))


def full_at(name: str) -> None:
    """No space on the disk from the first file or folder on whose path holds `name`."""
    full = False

    def fail(event: str, path: str) -> None:
        nonlocal full
        full = full or name in path
        if full and event not in ("os.remove", "os.rmdir"):  # which go on a full disk, too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_writes(fail)


def small_files(size: int) -> None:
    """No file can grow over `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def before_call(owner: Any, name: str, number: int, act: Callable[..., None]) -> None:
    """Call `act` with the arguments of the `number`-th call of `owner.name`, before it."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def infinite_gradient(call: int) -> None:
    """One gradient of the `call`-th optimizer step is infinite."""
    import torch

    def spoil(optimizer: Any, *_: Any) -> None:
        optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = float("inf")

    before_call(torch.optim.Adam, "step", call, spoil)


def no_memory(call: int) -> None:
    """The `call`-th optimizer step wants more memory than there is."""
    import torch

    before_call(torch.optim.Adam, "step", call, lambda *_: torch.empty(2**55))


def no_device_memory(call: int) -> None:
    """The same on a GPU, in the words that torch has for it."""
    import torch

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    before_call(torch.optim.Adam, "step", call, fail)


# The classifier is called three times before the first step: to try it, to probe it, and for the
# reference.


def broken_classifier(step: int) -> None:
    """Its weights turn to NaN before it scores the samples of `step`, for good."""
    from ppo_cli.rewards.sentiment import SentimentReward

    def spoil(reward: Any, _: Any) -> None:
        for weights in reward.classifier.parameters():
            weights.data.fill_(float("nan"))

    before_call(SentimentReward, "of_labels", step + 3, spoil)


def failing_classifier(step: int) -> None:
    """It raises once, for the samples of `step`."""
    from ppo_cli.rewards.sentiment import SentimentReward

    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("index out of range in self")

    before_call(SentimentReward, "of_labels", step + 3, fail)


def collapsed_text(step: int) -> None:
    """Every response to `step` is the same."""
    from ppo_cli.training import step as training_step

    def make_alike(_: Any, __: Any, responses: list[Any], *___: Any, **____: Any) -> None:
        responses[:] = [responses[0]] * len(responses)

    before_call(training_step, "to_texts", step, make_alike)


def slow_step(step: int) -> None:
    """`step` takes half a minute; the file `slow` says that it has begun."""

    def wait() -> None:
        Path("slow").touch()
        time.sleep(30)

    at_step(step, wait)


def at_step(step: int, act: Callable[[], None]) -> None:
    """Call `act` between sampling and learning of `step`, counted from where the process begins."""
    from ppo_cli.training import step as training_step

    before_call(training_step, "to_texts", step, lambda *_, **__: act())


def signal_itself(number: int) -> None:
    """Send the process a signal."""
    os.kill(os.getpid(), number)


def signal_at_stop(call: int) -> None:
    """SIGTERM comes while the processes ask each other, for the `call`-th time, whether to stop."""
    from ppo_cli.training.run import Training
    from ppo_cli.utils import processes

    original = processes.any_of

    def interrupted(flag: bool) -> bool:
        found = original(flag)
        signal_itself(signal.SIGTERM)
        return found

    def patch(*_: Any) -> None:
        processes.any_of = interrupted  # type: ignore[assignment]

    def unpatch(*_: Any) -> None:
        processes.any_of = original

    before_call(Training, "_stops", call, patch)
    before_call(Training, "_one_step", call, unpatch)


def one_gpu() -> None:
    """A machine with one GPU, when devices are chosen."""
    import torch

    from ppo_cli.training import build

    def patch(_: Any) -> None:
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 1

    before_call(build, "resolve_device", 1, patch)


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def no_reader(*descriptors: int) -> None:
    """What is written to `descriptors` has nobody who reads it."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in descriptors:
        os.dup2(writer, descriptor)
    os.close(writer)


def full_disk_behind(descriptor: int) -> None:
    """What is written to `descriptor` finds no space on its disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def closed_streams(*descriptors: int) -> None:
    """As a process begins whose parent closed `descriptors`."""
    for descriptor in descriptors:
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)


def read_only(descriptor: int) -> None:
    """`descriptor` is open, but not for writing."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), descriptor)


def on_terminal(name: str, nohup: bool = False, **variables: str) -> None:
    """The process leads a session on the terminal `name`, which is all of its streams."""
    # The tests themselves may run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # of a leader without a terminal it becomes the terminal
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    os.environ |= {"TERM": "xterm", **variables}


def surroundings(**variables: str) -> None:
    """Environment variables."""
    os.environ |= variables


def ascii_streams() -> None:
    """Standard output and error know ASCII alone."""
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="ascii", closefd=False)  # noqa: SIM115


def helper_leaves(step: int = 2) -> None:
    """A program that a step writes to ends: writing to it fails from `step` on."""
    from ppo_cli import PPOTrainer

    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    before_call(PPOTrainer, "step", step, fail)


def begin_anew(number: int, config: str) -> None:
    """Replaces the run in `run` by a new one, of no step, with a kill before the n-th change."""
    from ppo_cli.config.loading import load_config
    from ppo_cli.training.run_directory import RunDirectory

    settings = load_config(config, overrides={("run", "output"): "run"})
    kill_at_write(number)
    RunDirectory("run").create(settings, overwrite=True)
    os._exit(0)
