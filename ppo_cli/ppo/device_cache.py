"""Memory that the device's allocator keeps, given back after a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import clear_device_cache


class PPODecorators:
    """TRL's decorators for methods of a trainer's subclass.

    Attributes:
        optimize_device_cache: whether `empty_device_cache` does anything; `PPOTrainer` sets it from
            its configuration.
    """

    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        """Decorate a function: after each call its unused memory of the device is given back."""
        yield
        if cls.optimize_device_cache:
            clear_device_cache(garbage_collection=True)
