"""Steps that a GPU takes again without being told each kernel anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class NotReplayable(RuntimeError):
    """A step that does not do the same each time, or has to wait for the GPU."""


class Replayed:
    """A step as a CUDA graph: the first call takes it once as it is and records it, others replay.

    A small model's step is some hundred kernels of a few microseconds each, which take longer to
    launch one by one than to run.

    Args:
        step: works in place, on tensors that stay where they are.

    Raises:
        NotReplayable: by the first call, in the middle of the step, which may be half done.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        try:
            with torch.cuda.stream(beside):
                with _nothing_waits():  # a recording that fails may leave the allocator confused
                    self._step()
                # Not torch.cuda.graph, which gives all unused memory back to the driver first.
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._step()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotReplayable(str(error)) from error
        finally:
            here.wait_stream(beside)
        self._graph = graph


@contextmanager
def _nothing_waits() -> Iterator[None]:
    """Raise RuntimeError where the CPU would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
