"""The processes of a run: who is there, what all of them have, and errors that all raise.

Everything here works with one process, too, where it costs nothing. Functions that say that all
processes call them wait for the others: each has to come to them in the same order.
"""

from __future__ import annotations

import io
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from os import environ
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ppo_cli.errors import PPOCliError
from ppo_cli.utils import launcher

T = TypeVar("T")
AS_ARRAYS = {torch.float32, torch.float64, torch.int64, torch.int32, torch.bool}


def start(timeout: float) -> None:
    """Start the process group of the processes that a launcher started; do nothing for one.

    Args:
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        PPOCliError: they do not find each other.
    """
    if launcher.count() == 1 or _has_group():
        return
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
    first, end = (i * total // count() for i in (index(), index() + 1))
    return slice(first, end)


def gather(value: T) -> list[T]:
    """The processes' values, in their order. All processes call it.

    Args:
        value: anything that can be pickled; tensors should be on the CPU.
    """
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, _as_bytes(value))
    return [pickle.loads(data) for data in values]


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
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(count())]
    dist.all_gather(lengths, torch.full_like(lengths[0], len(tensor)))
    sizes = torch.cat(lengths).tolist()
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


def gather_from(function: Callable[..., T], *args: Any, **kwargs: Any) -> list[T]:
    """What a call returns in each process, in their order. All processes call it.

    Inside the call no process may wait for another.

    Raises:
        Exception: the error of the first process that has one, on all processes.
    """
    if count() == 1:
        return [function(*args, **kwargs)]
    own, value = None, None
    try:
        value = function(*args, **kwargs)
    except Exception as error:
        own = error
    found = gather((own and _sendable(own), value))
    _raise_first([error for error, _ in found], own)
    return [result for _, result in found]  # type: ignore[misc]


def on_main(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function on the main process alone; all get its result. All processes call it.

    Raises:
        Exception: what the function raised, on all processes.
    """
    return gather_from(lambda: function(*args, **kwargs) if is_main() else None)[0]  # type: ignore[return-value]


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
    _raise_first(gather(own and _sendable(own)), own)


def _raise_first(errors: Sequence[Exception | None], own: Exception | None) -> None:
    """Raise the error of the first process that has one; this process's own is the original."""
    for process, error in enumerate(errors):
        if error is not None:
            first: Any = own if process == index() else error
            first.is_agreed = True  # the main process tells it
            raise first


def leave() -> None:
    """Wait until all processes are at their end, as far as they answer. All processes call it.

    A launcher such as torchrun sends SIGTERM to the others when one ends in an error: before that
    the main process has to have said what it says.
    """
    if count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(Exception):
            gather(None)


def _sendable(error: Exception) -> Exception:
    """An error for other processes; one that cannot be pickled is told in words."""
    try:
        pickle.loads(pickle.dumps(error))  # some only fail here
    except Exception:
        return PPOCliError(f"{type(error).__name__}: {error}")
    return error


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, which takes a tenth of the time of torch's own way."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.device.type == "cpu" and value.dtype in AS_ARRAYS:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _as_bytes(value: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data, pickle.HIGHEST_PROTOCOL).dump(value)
    return data.getvalue()


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
