"""Steps that a GPU takes again without being told each kernel anew."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch


class _Recordings(threading.local):
    """A thread's stream on each GPU, to record on, and its last recording there.

    The next recording has the memory of the last: of those that are gone torch takes it back only
    when it has run out.
    """

    def __init__(self) -> None:
        self.latest: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = {}


_RECORDINGS = _Recordings()


class NotCapturable(RuntimeError):
    """A step that does not do the same each time, or has to wait for the GPU."""


class GraphedStep:
    """A step as a CUDA graph: the first call takes it once as it is and records it, others replay.

    A small model's step is some hundred kernels of a few microseconds each, which take longer to
    launch one by one than to run. A thread replays one step at a time on a device: the next that it
    records works in the same memory.

    Args:
        step: works in place, on tensors that stay where they are.
        device: where all of it happens.
        proven: such a step was recorded before, so it need not be watched, which would disturb
            other threads that wait for a GPU.

    Raises:
        NotCapturable: by the first call, in the middle of the step, which may be half done.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, proven: bool) -> None:
        self._step, self._device, self._proven = step, device, proven
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        here = torch.cuda.current_stream(self._device)
        beside, last = _RECORDINGS.latest.get(self._device, (None, None))
        beside = beside or torch.cuda.Stream(self._device)
        beside.wait_stream(here)
        try:
            with torch.cuda.stream(beside):
                # A recording that fails may leave the allocator confused: watch the step before it.
                with nullcontext() if self._proven else no_gpu_sync():
                    self._step()
                # Not torch.cuda.graph, which gives all unused memory back to the driver first.
                graph = torch.cuda.CUDAGraph()
                pool = None if last is None else last.pool()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._step()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotCapturable(str(error)) from error
        finally:
            here.wait_stream(beside)
        self._graph = graph
        _RECORDINGS.latest[self._device] = beside, graph


@contextmanager
def no_gpu_sync() -> Iterator[None]:
    """Raise RuntimeError where the CPU, any thread of it, would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
