"""Matrix products and attention, taken over from torch where another way is faster or holds less.

On x86 torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone:
on an AMD EPYC (Zen 5) it makes 220 GFLOP/s on two cores, where oneDNN, which torch brings along,
reaches 470 in the same precision. `fast_layers` sends linear layers there. Where a processor has
AVX2 at most, MKL is the faster of the two (Zen 3: by a fifth to a half), and stays.

Under bfloat16 autocast it is oneDNN anyway. There layers that learn keep no copy of their weight,
and attention over short rows goes another way (`attention.py`).
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from ppo_cli.kernels.switch import is_enabled

# oneDNN compiles a kernel for each shape. With small weights nothing was gained on Zen 4.
SMALLEST_WEIGHT = 2**19
TILE_BYTES = 2**22  # of a wide matrix that MKL multiplies by at a time
FEW_ROWS = 32

_LINEAR = torch.nn.functional.linear


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, worthwhile: bool = True) -> Tensor:
    """`a @ b.T + bias` for a (M, K), b (N, K) and bias (N,), of any strides; not differentiable.

    By oneDNN where it is the faster library, unless it is not `worthwhile`, see `is_large_weight`.
    """
    if worthwhile and a.dtype == torch.float32 and a.device.type == "cpu" and uses_onednn():
        return by_onednn(a, b, bias)
    return _LINEAR(a, b, bias)


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` for a b (N, K) that is far larger than the processor's cache.

    Measured with AVX2: MKL multiplies by a piece of b that the cache holds a fifth to a third
    faster than by the whole, and oneDNN multiplies a few rows of a a sixth faster still.
    """
    worthwhile = is_large_weight(b)
    tiles = row_slices(len(b), b.shape[1], TILE_BYTES)
    by_mkl = a.device.type == "cpu" and not (worthwhile and prefers_onednn())
    if not is_enabled("matmul") or not by_mkl or 4 * b.shape[1] > TILE_BYTES or len(tiles) <= 2:
        return product(a, b, bias, worthwhile=worthwhile)
    if len(a) <= FEW_ROWS and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return by_onednn(a, b, bias)
    result = a.new_empty(len(a), len(b))
    for tile in tiles:
        torch.mm(a, b[tile].t(), out=result[:, tile])
    return result if bias is None else result.add_(bias)


def by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` by oneDNN, whose layout b may have."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


def row_slices(count: int, width: int, limit: int) -> list[slice]:
    """Rows 0..count in slices of at most `limit` bytes of float32 at `width` numbers a row."""
    step = max(limit // (4 * width), 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def is_large_weight(weight: Tensor) -> bool:
    """Whether products with a weight are large enough for oneDNN to be worth its memory."""
    return weight.numel() >= SMALLEST_WEIGHT


def uses_onednn() -> bool:
    """Whether float32 products take oneDNN: the path `matmul` is on, and it is the faster one."""
    return is_enabled("matmul") and prefers_onednn()


@functools.cache
def prefers_onednn() -> bool:
    """Whether torch multiplies with MKL, but the processor has an AVX-512 that MKL does not use."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4000]
    except OSError:
        return platform.processor()
