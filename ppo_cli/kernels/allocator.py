"""Memory that the C library and oneDNN keep for later.

Both functions change the whole process until it ends. The commands call them; importing ppo_cli or
making a `PPOTrainer` does not. A Python program that trains should call both once, before its first
step: on a CPU that saves time and memory.
"""

from __future__ import annotations

import ctypes
import os

from ppo_cli.kernels.switch import is_enabled

CACHE_CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables: how many compiled kernels torch keeps, and oneDNN in a list beside it."""
KERNELS_KEPT = 32


def keep_freed_memory() -> bool:
    """Make glibc keep freed buffers for the next allocation, by `mallopt`.

    By default glibc returns buffers of some MiB to the operating system whenever they are freed.
    Allocated again, each of their pages faults: a fifth of the time of an optimisation phase.

    Returns:
        Whether the setting was made: the path `allocator` is on, and the C library is glibc.
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
    """Limit the compiled kernels that torch and oneDNN keep to about those of one batch.

    oneDNN compiles a kernel for each shape of a product and keeps 1,024 of them, of 1 to 2 MB each:
    hundreds of MB if batches differ in length. The kernels of one batch are enough, because all
    layers and epochs use them. Both libraries read the limit from the environment at their first
    product, so call this before. A variable that is set already is left as it is.
    """
    if is_enabled("allocator"):
        for variable in CACHE_CAPACITIES:
            os.environ.setdefault(variable, str(KERNELS_KEPT))
