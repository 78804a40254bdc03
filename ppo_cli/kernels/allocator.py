"""Memory of the process: what the C library and oneDNN keep of it for later.

Both functions affect the whole process, for good. The commands call them; nothing else here does. A
program of your own that trains calls both, once, before its first step.
"""

from __future__ import annotations

import ctypes
import os

from ppo_cli.kernels.switch import is_enabled

CACHE_CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables: how many compiled kernels torch keeps, and oneDNN in a list beside it."""
KERNELS_KEPT = 32


def keep_freed_memory() -> bool:
    """Let the C library keep freed buffers for the next allocation.

    By default glibc returns buffers of some MiB to the operating system at every free and gets them
    back as empty pages, each of which faults: a fifth of an optimisation phase.

    Returns:
        Whether that was done: the path `allocator` is on and the C library is glibc.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    if not is_enabled("allocator"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    if not mallopt(mmap_threshold, 2**30):
        mallopt(mmap_threshold, 2**25)  # the most that older releases take, says mallopt(3)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
    return True


def limit_kernel_caches() -> None:
    """Let torch and oneDNN keep the compiled kernels of one batch, unless the environment decides.

    oneDNN compiles a kernel for each shape of a product and keeps 1,024 of them, of 1 to 2 MB each:
    hundreds of MB where batches differ in length. One batch's are enough, as each serves all layers
    and epochs. Both libraries read their limit at their first product, so this comes before it.
    """
    if is_enabled("allocator"):
        for variable in CACHE_CAPACITIES:
            os.environ.setdefault(variable, str(KERNELS_KEPT))
