"""Random number generators: separate streams, and the states that a checkpoint holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


class RandomStream:
    """A separate stream of torch random numbers.

    Code inside `active()` draws from it and does not change the random state of the process. So a
    trainer is reproducible without reseeding the program around it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        with self._preserved():
            torch.manual_seed(seed)
            self._state = self._read()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream until the block ends."""
        with self._preserved():
            self._write(self._state)
            try:
                yield
            finally:
                self._state = self._read()

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states, uint8 tensors by device."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        self._state = dict(state)

    @contextmanager
    def _preserved(self) -> Iterator[None]:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    def _read(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _write(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)


def numpy_state(source: np.random.RandomState) -> dict[str, Any]:
    """State of a NumPy generator as plain values, for JSON."""
    state: dict[str, Any] = source.get_state(legacy=False)
    state["state"]["key"] = [int(word) for word in state["state"]["key"]]
    return state


def set_numpy_state(target: np.random.RandomState, state: dict[str, Any]) -> None:
    """Restore a `numpy_state`."""
    key = np.asarray(state["state"]["key"], dtype=np.uint32)
    target.set_state({**state, "state": {**state["state"], "key": key}})


def random_state() -> dict[str, Any]:
    """Global states of the generators of Python, NumPy, torch and its devices."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": numpy_state(cast(np.random.RandomState, np.random)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a `random_state`; devices that this machine lacks are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    set_numpy_state(cast(np.random.RandomState, np.random), state["numpy"])
    torch.set_rng_state(state["torch"])
    for index, device_state in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
