"""The cache of keys and values, allocated once."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ppo_cli.errors import UnsuitableModel
from ppo_cli.kernels.switch import is_enabled

ALIGNMENT = 8  # tokens; attention on a GPU copies a mask whose rows are no multiple of it


def preallocated_cache(config: Any, capacity: int) -> DynamicCache:
    """transformers' `DynamicCache` with plain layers allocated for `capacity` tokens."""
    cache = DynamicCache(config=config)
    if not is_enabled("kv_cache"):
        return cache
    capacity += -capacity % ALIGNMENT
    cache.layers = [
        _PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def has_windows(config: Any) -> bool:
    """Whether layers of a model do not attend to all earlier tokens, or not in the usual way."""
    return any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument of a model's forward pass; no argument for None.

    transformers 5.24 renames `past_key_values` to `cache`.
    """
    kind: Any = type(model)
    return {} if cache is None else {_keyword(kind): cache}


@functools.cache
def _keyword(kind: Any) -> str:
    is_renamed = "cache" in inspect.signature(kind.forward).parameters
    return "cache" if is_renamed else "past_key_values"


def make_static(cache: DynamicCache, slot: Tensor) -> int:
    """Make all later updates write one token at `slot` and return the whole buffers.

    Each step then reads and writes the same memory in the same shapes. The attention mask must
    exclude what has not been written.

    Args:
        cache: made by `preallocated_cache`, and written to.
        slot: (1,) on the cache's device; the index of the next token. The caller advances it.

    Returns:
        Capacity of the layers, tokens.

    Raises:
        UnsuitableModel: a layer has a window, or is of another kind.
    """
    for layer in cache.layers:
        if not isinstance(layer, _PreallocatedLayer):
            raise UnsuitableModel(f"a {type(layer).__name__} has no fixed size")
        layer.make_static(slot)
    return cache.layers[0].capacity


class _PreallocatedLayer(DynamicLayer):
    """Keys and values in buffers allocated once, instead of a longer copy for each token."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._end = 0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._slot: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            rows = len(key_states)
            self._buffers = (self._allocate(key_states, rows), self._allocate(value_states, rows))
        if self._slot is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self._slot, states)
            return self._buffers
        start, self._end = self._end, self._end + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._end] = states
        self._set_views()
        return self.keys, self.values

    def make_static(self, slot: Tensor) -> None:
        """Do what the function `make_static` says, after the first update."""
        if self._buffers is None:
            raise UnsuitableModel("a layer that was not written to has no buffers")
        self._slot = slot
        for buffer in self._buffers:  # attention would propagate a NaN even where it is masked
            buffer[:, :, self._end :] = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._buffers is None:
            return
        kept = []
        for buffer in self._buffers:
            kept.append(self._allocate(buffer, len(indices)))
            kept[-1][:, :, : self._end] = buffer[indices, :, : self._end]
        self._buffers = (kept[0], kept[1])
        self._set_views()

    def _set_views(self) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, : self._end] for buffer in self._buffers)

    def _allocate(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.capacity, like.shape[3])
