"""The processes of a run: who is there, what all of them have, and errors that all raise.

Everything here works with one process, too, where it costs nothing. Functions that say that all
processes call them wait for the others: each has to come to them in the same order.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from os import environ
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ppo_cli.errors import PPOCliError, UsageError
from ppo_cli.utils import launcher

T = TypeVar("T")


def start(timeout: float) -> None:
    """Start the process group of the processes that a launcher started; do nothing for one.

    Args:
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        UsageError: the launcher left out what they need to find each other.
        PPOCliError: they do not find each other.
    """
    if launcher.count() == 1 or _has_group():
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]:
        raise UsageError(
            f"WORLD_SIZE is {launcher.count()}, but {' and '.join(missing)} are not set: start the "
            "processes with torchrun, accelerate launch or --num-processes, or unset WORLD_SIZE"
        )
    limit = timedelta(seconds=timeout)
    distributed_c10d.default_pg_timeout = limit  # of groups that are made later
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise PPOCliError(
            f"the {launcher.count()} processes of this run do not find each other at "
            f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error


def count() -> int:
    """Number of processes; 1 where no process group was started."""
    return dist.get_world_size() if _has_group() else 1


def index() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _has_group() else 0


def is_main() -> bool:
    """Whether this is the process that displays and writes."""
    return index() == 0


def rows(total: int) -> slice:
    """This process's share of `total` rows: neighbours, as many as the others have or one less."""
    return share(total, index(), count())


def share(total: int, part: int, parts: int) -> slice:
    """The rows of one of several parts of `total` rows."""
    bounds = [i * total // parts for i in (part, part + 1)]
    return slice(*bounds)


def gather(value: T) -> list[T]:
    """The processes' values, in their order. All processes call it.

    Args:
        value: anything that can be pickled; tensors should be on the CPU.
    """
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def gather_list(values: Sequence[T]) -> list[T]:
    """The processes' lists, joined. All processes call it."""
    return [value for part in gather(list(values)) for value in part]


def gather_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The processes' lists of tensors, joined; on the CPU where there are several processes."""
    if count() == 1:
        return list(tensors)
    return gather_list([tensor.detach().cpu() for tensor in tensors])


def gather_rows(tensor: Tensor) -> Tensor:
    """(n, ...) of each process -> all rows, on the same device. All processes call it.

    The processes may have different numbers of rows.
    """
    if count() == 1:
        return tensor
    sizes = gather(len(tensor))
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, which have one shape. All processes call it."""
    if count() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result)
    return result


def any_of(flag: bool) -> bool:
    """Whether the flag is true on any process. All processes call it."""
    return any(gather(flag))


def on_main(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function on the main process alone; all get its result. All processes call it.

    Raises:
        Exception: what the function raised, on all processes.
    """
    with agreed():
        result = function(*args, **kwargs) if is_main() else None
    return gather(result)[0]  # type: ignore[return-value]


@contextmanager
def agreed() -> Iterator[None]:
    """Around work that may fail: an error of one process is raised on all at the end of the block.

    Inside it no process may wait for another. All processes come to it.

    Raises:
        Exception: the error of the first process that has one.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
        if count() == 1:
            raise
    errors = gather(None if own is None else _as_bytes(own))
    for process, data in enumerate(errors):
        if data is not None:
            first: Any = own if process == index() else pickle.loads(data)
            first.is_agreed = True  # the main process tells it
            raise first


def _as_bytes(error: Exception) -> bytes:
    """An error for other processes; one that cannot be pickled is told in words."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # some only fail here
    except Exception:
        data = pickle.dumps(PPOCliError(f"{type(error).__name__}: {error}"))
    return data


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
