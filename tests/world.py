"""Functions called in several processes at once, each a member of one process group (gloo)."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forked import server


def in_world(
    function: Callable[..., Any], *arguments: Any, processes: int = 2, seconds: float = 240
) -> list[Any]:
    """What `function`, of a module, returns in each process, in their order.

    Args:
        seconds: after which a process is killed.

    Raises:
        AssertionError: it raised in one of them; with its traceback.
    """
    context = server()
    with tempfile.TemporaryDirectory(prefix="ppo-cli-world-") as folder, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        members = [
            context.Process(
                target=_member, args=(function, arguments, i, processes, port, folder), daemon=True
            )
            for i in range(processes)
        ]
        for member in members:
            member.start()
        for member in members:
            member.join(seconds)
            member.kill()
        results = []
        for i in range(processes):
            path = Path(folder, str(i))
            assert path.exists(), f"process {i} left nothing (exit code {members[i].exitcode})"
            kind, result = pickle.loads(path.read_bytes())
            assert kind == "result", f"process {i}: {result}"
            results.append(result)
    return results


def _member(
    function: Callable[..., Any], arguments: Any, index: int, count: int, port: int, folder: str
) -> None:
    """What one process does."""
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count)}
    try:
        outcome: tuple[str, Any] = ("result", function(*arguments))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    unfinished = Path(folder, f".{index}")
    unfinished.write_bytes(pickle.dumps(outcome))
    unfinished.rename(Path(folder, str(index)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
