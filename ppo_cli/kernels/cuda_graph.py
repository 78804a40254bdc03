"""Steps that are captured as a CUDA graph and replayed, without launching each kernel again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch


class _Captures(threading.local):
    """For each GPU, this thread's stream for capturing and its latest graph.

    The next graph uses the memory pool of the latest one. torch frees the pools of graphs that were
    deleted only when memory runs out.
    """

    def __init__(self) -> None:
        self.latest: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = {}


_CAPTURES = _Captures()


class NotCapturable(RuntimeError):
    """A step that cannot be captured: it varies, or waits for the GPU."""


class GraphedStep:
    """A step as a CUDA graph: the first call runs it once and captures it, later calls replay it.

    A step of a small model consists of some hundred kernels of a few microseconds, which take
    longer to launch than to run. Only the latest graph of a thread and device may be replayed: the
    next one uses the same memory.

    Args:
        step: works in place, on tensors whose memory does not change.
        device: device of all these tensors.
        proven: whether such a step was captured before. If not, the first run raises an error where
            it waits for the GPU; that check also affects other threads.

    Raises:
        NotCapturable: in the first call. The step may be half done then.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, proven: bool) -> None:
        self._step, self._device, self._proven = step, device, proven
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        current = torch.cuda.current_stream(self._device)
        capturing, last = _CAPTURES.latest.get(self._device, (None, None))
        capturing = capturing or torch.cuda.Stream(self._device)
        capturing.wait_stream(current)
        try:
            with torch.cuda.stream(capturing):
                # A capture that fails may corrupt the allocator's state, so check the step before.
                with nullcontext() if self._proven else no_gpu_sync():
                    self._step()
                # torch.cuda.graph would first return all unused memory to the driver.
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
            current.wait_stream(capturing)
        self._graph = graph
        _CAPTURES.latest[self._device] = capturing, graph


@contextmanager
def no_gpu_sync() -> Iterator[None]:
    """Raise RuntimeError wherever a thread would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
