"""Matrix products on a CPU by the faster of the two libraries that torch includes.

On x86 torch multiplies float32 matrices with MKL, which uses AVX-512 only on Intel's processors: on
an AMD EPYC (Zen 5) it reaches 220 GFLOP/s on two cores, and oneDNN 470 in the same precision. On
processors without AVX-512 MKL is the faster one (Zen 3: by a fifth to a half) and is kept.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from ppo_cli.kernels.switch import is_enabled

# Elements. oneDNN compiles a kernel for each shape; smaller weights gained nothing on Zen 4.
MIN_WEIGHT_SIZE = 2**19
TILE_BYTES = 2**22  # of a wide matrix in one product by MKL
FEW_ROWS = 32

_LINEAR = torch.nn.functional.linear


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, worthwhile: bool = True) -> Tensor:
    """`a @ b.T + bias`, not differentiable.

    Args:
        a, b, bias: (M, K), (N, K) and (N,) or None, of any strides.
        worthwhile: whether oneDNN may be used, see `is_large_weight`; it is if it is faster here.
    """
    if worthwhile and a.dtype == torch.float32 and a.device.type == "cpu" and uses_onednn():
        return by_onednn(a, b, bias)
    return _LINEAR(a, b, bias)


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` for a matrix b (N, K) that is much larger than the processor's cache.

    Measured on processors with AVX2: MKL is a fifth to a third faster with pieces of b that fit
    into the cache, and oneDNN is another sixth faster if a has few rows.
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
    """`product` by oneDNN. b may have been reordered for it."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


def row_slices(count: int, width: int, limit: int) -> list[slice]:
    """Slices of rows 0..count of at most `limit` bytes each, with `width` float32 numbers a row."""
    step = max(limit // (4 * width), 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def is_large_weight(weight: Tensor) -> bool:
    """Whether products with a weight are large enough to repay oneDNN's memory for kernels."""
    return weight.numel() >= MIN_WEIGHT_SIZE


def uses_onednn() -> bool:
    """Whether float32 products use oneDNN: the path `matmul` is on, and oneDNN is faster here."""
    return is_enabled("matmul") and prefers_onednn()


@functools.cache
def prefers_onednn() -> bool:
    """Whether the processor has AVX-512 and torch's MKL does not use it."""
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
