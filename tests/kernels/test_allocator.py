"""Memory that a process keeps: freed buffers, and compiled kernels of oneDNN."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from ppo_cli.kernels.allocator import CACHE_CAPACITIES, keep_freed_memory
from ppo_cli.kernels.switch import VARIABLE

GROWTH = """
import torch
from ppo_cli.kernels.allocator import limit_kernel_caches
limit_kernel_caches()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
weights = [torch.zeros(n, 256) for n in (256, 320, 384, 448)]
def multiply(rows):
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(torch.zeros(rows, 256), weight, None, "none", [], "")
for rows in range(900, 920):
    multiply(rows)
before = resident()
for rows in range(400, 600):
    multiply(rows)
print(resident() - before)
"""


def growth(**limits: str) -> float:
    """Growth of a process, in MiB, by 800 products of different shapes."""
    names = (*CACHE_CAPACITIES, VARIABLE)
    environment = {key: value for key, value in os.environ.items() if key not in names} | limits
    command = [sys.executable, "-c", GROWTH]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout)


@pytest.mark.skipif(
    not (sys.platform == "linux" and torch.backends.mkldnn.is_available()),
    reason="reads /proc, and torch needs oneDNN",
)
def test_kernels_of_past_shapes_are_let_go_unless_the_user_wants_them_kept() -> None:
    kept = growth(LRU_CACHE_CAPACITY="1024", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert kept > 20
    assert growth() < kept / 4


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_keeping_freed_memory_is_not_to_be_had_everywhere_but_never_an_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: None) -> Any:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    keep_freed_memory()


@pytest.mark.parametrize("largest_threshold", [0, 2**25, 2**30])
def test_keeping_freed_memory_takes_what_glibc_accepts_and_may_be_asked_twice(
    largest_threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_freed_memory()
    keep_freed_memory()
    accepted: dict[int, int] = {}

    class Library:
        def mallopt(self, parameter: int, value: int) -> int:
            assert 0 < value < 2**31  # C's int
            if parameter == -3 and value > largest_threshold:
                return 0
            assert parameter not in accepted
            accepted[parameter] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    keep_freed_memory()
    assert set(accepted) == {-1, -2} | ({-3} if largest_threshold else set())
    assert accepted.get(-3, 0) == largest_threshold


def test_keeping_freed_memory_does_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # musl: no such function
    keep_freed_memory()
