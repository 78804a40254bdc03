"""Compiled kernels of oneDNN that a process keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ppo_cli.kernels.kernel_caches import CACHE_CAPACITIES
from ppo_cli.kernels.switch import VARIABLE

GROWTH = """
import torch
from ppo_cli.kernels.kernel_caches import limit_kernel_caches
limit_kernel_caches()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
weights = [torch.zeros(n, 256) for n in (256, 320, 384, 448)]
def multiply(rows):
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(torch.zeros(rows, 256), weight, None, "none", [], "")
for rows in range(900, 910):
    multiply(rows)
before = resident()
for rows in range(400, 420):
    multiply(rows)
print(resident() - before)
"""


def growth(**limits: str) -> float:
    """Growth of a process, in MiB, by 80 products of different shapes."""
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
    assert kept > 10
    assert growth() < kept / 4
