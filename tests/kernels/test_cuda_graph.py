"""Capturing a step, with a stand-in for CUDA that records the calls.

With a GPU: `test_gpu.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppo_cli.kernels import cuda_graph
from ppo_cli.kernels.cuda_graph import GraphedStep, NotCapturable

GPU = torch.device("cuda", 1)


class Stream:
    """Records the streams that it waited for."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Graph:
    """Records its memory pool, its stream, and the number of replays."""

    def __init__(self) -> None:
        self.borrowed: Any = None
        self.replays = 0
        self.open = False

    def pool(self) -> Any:
        return self.borrowed or id(self)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        self.borrowed, self.open = pool, True

    def capture_end(self) -> None:
        self.open = False

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Streams entered, graphs made, and modes of the check for waiting that were set."""
    seen = SimpleNamespace(here=Stream(), entered=[], graphs=[], alarm=["default"])

    @contextmanager
    def stream(which: Stream) -> Iterator[None]:
        seen.entered.append(which)
        yield

    def graph() -> Graph:
        seen.graphs.append(Graph())
        return seen.graphs[-1]

    monkeypatch.setattr(cuda_graph._CAPTURES, "latest", {})
    for name, value in {
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device: seen.here,
        "CUDAGraph": graph,
        "get_sync_debug_mode": lambda: seen.alarm[-1],
        "set_sync_debug_mode": seen.alarm.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_the_first_call_takes_the_step_and_records_it_the_others_replay(
    cuda: SimpleNamespace,
) -> None:
    recording: list[bool] = []

    def step() -> None:
        recording.append(any(graph.open for graph in cuda.graphs))

    replayed = GraphedStep(step, GPU, proven=False)
    for _ in range(4):
        replayed()
    assert recording == [False, True]
    (graph,) = cuda.graphs
    assert graph.replays == 3
    assert not graph.open
    (beside,) = cuda.entered
    assert beside.device == GPU
    assert (beside.waited, cuda.here.waited) == ([cuda.here], [beside])


@pytest.mark.parametrize("proven", [False, True])
def test_a_step_is_watched_before_it_is_recorded_unless_it_is_proven(
    proven: bool, cuda: SimpleNamespace
) -> None:
    watched: list[str] = []
    GraphedStep(lambda: watched.append(cuda.alarm[-1]), GPU, proven=proven)()
    assert watched == ["default" if proven else "error", "default"]
    assert cuda.alarm[-1] == "default"


def test_recordings_on_one_device_have_one_stream_and_one_memory(cuda: SimpleNamespace) -> None:
    for device in (GPU, GPU, torch.device("cuda", 0), GPU):
        GraphedStep(lambda: None, device, proven=True)()
    first, second, elsewhere, third = cuda.graphs
    assert (first.borrowed, elsewhere.borrowed) == (None, None)
    assert second.borrowed == third.borrowed == first.pool()
    assert len({id(stream) for stream in cuda.entered}) == 2


def test_each_thread_records_in_memory_of_its_own(cuda: SimpleNamespace) -> None:
    GraphedStep(lambda: None, GPU, proven=True)()
    thread = threading.Thread(target=GraphedStep(lambda: None, GPU, proven=True))
    thread.start()
    thread.join()
    assert [graph.borrowed for graph in cuda.graphs] == [None, None]


@pytest.mark.parametrize("call", [1, 2], ids=["watched", "recorded"])
def test_a_step_that_fails_is_said_to_be_not_replayable_and_nothing_is_left_open(
    call: int, cuda: SimpleNamespace
) -> None:
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(NotCapturable, match="synchronizing"):
        GraphedStep(step, GPU, proven=False)()
    assert cuda.alarm[-1] == "default"
    assert not any(graph.open for graph in cuda.graphs)
    assert cuda.here.waited == cuda.entered
    assert not cuda_graph._CAPTURES.latest


def test_memory_that_runs_out_is_the_callers_to_hear_of(cuda: SimpleNamespace) -> None:
    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        GraphedStep(step, GPU, proven=True)()
