"""Compiled kernels that torch and oneDNN keep for later.

The limit holds for the whole process until it ends. The commands set it; importing ppo_cli or
making a `PPOTrainer` does not. A Python program that trains on a CPU should call
`limit_kernel_caches` once, before its first step: that saves memory.
"""

from __future__ import annotations

import os

from ppo_cli.kernels.switch import is_enabled

CACHE_CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables: how many compiled kernels torch keeps, and oneDNN in a list beside it."""
KERNELS_KEPT = 32


def limit_kernel_caches() -> None:
    """Limit the compiled kernels that torch and oneDNN keep to about those of one batch.

    oneDNN compiles a kernel for each shape of a product and keeps 1,024 of them, of 1 to 2 MB each:
    hundreds of MB if batches differ in length. The kernels of one batch are enough, because all
    layers and epochs use them. Both libraries read the limit from the environment at their first
    product, so call this before. A variable that is set already is left as it is.
    """
    if is_enabled("kernel_caches"):
        for variable in CACHE_CAPACITIES:
            os.environ.setdefault(variable, str(KERNELS_KEPT))
