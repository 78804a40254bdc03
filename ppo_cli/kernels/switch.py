"""The switch of the fast paths: which are taken, in this thread.

The environment variable `PPO_CLI_KERNELS` decides, else `policy.kernels` of a run, else all are
taken that suit the machine and the model. Its values:

- `auto`, or nothing: all paths;
- `off`: none, plain torch and transformers;
- names: these paths alone, such as `matmul,lm_head`;
- names with a minus: all paths but these, such as `-packing`.

In Python `using` decides for a block. Only the standard library is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from ppo_cli.errors import UsageError, did_you_mean

VARIABLE = "PPO_CLI_KERNELS"

PATHS = {
    "matmul": "linear layers on a CPU by oneDNN, or in bfloat16 without a kept copy of weights",
    "attention": "attention over short rows on a CPU in bfloat16; on a GPU not by cuDNN",
    "lm_head": "the vocabulary projection at the positions needed, in pieces",
    "tied_embeddings": "one gradient for tied embeddings (with lm_head)",
    "packing": "several sequences in one row",
    "decode_loop": "sampling by a loop of our own in place of `generate`",
    "kv_cache": "a cache of keys and values that is allocated once (with decode_loop)",
    "cuda_graph": "sampling steps recorded and replayed on a CUDA GPU (with kv_cache)",
    "optimizer_in_backward": "weights that move during the backward pass",
    "allocator": "freed memory kept by the C library, few compiled kernels kept by oneDNN",
    "imports": "`generate` and `compare` import transformers without the compiler",
    "feed_forward": "the last feed-forward network at the positions needed (with lm_head)",
    "gelu": "GELU's tanh approximation by one kernel of torch in place of transformers' formula",
    "sigmoid": "that GELU by the sigmoid on a CPU in float32 (with gelu)",
}
"""Name -> what the path does."""


class _Choice(NamedTuple):
    """A setting, and where it was made."""

    setting: str
    source: str


_choice: ContextVar[_Choice | None] = ContextVar("kernels", default=None)


@contextmanager
def using(setting: str, source: str = "using") -> Iterator[None]:
    """Inside the block `setting` decides which fast paths this thread takes.

    It overrides the environment. A path is taken where it is on while a policy samples or learns,
    wherever policy and trainer were made; `gelu` alone is decided when a policy is made.

    Args:
        setting: as the value of `PPO_CLI_KERNELS`.
        source: what reports and errors call the place of the setting.

    Raises:
        UsageError: it names no such path.
    """
    choice = _Choice(setting, source)
    _parsed(choice)
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def configured(setting: str) -> AbstractContextManager[None]:
    """`using(setting)` for a run's `policy.kernels`, unless the environment decides.

    Raises:
        UsageError: the environment variable names no such path.
    """
    if not os.environ.get(VARIABLE):
        return using(setting, "policy.kernels")
    enabled()
    return nullcontext()


def enabled() -> frozenset[str]:
    """The names of the paths that are on.

    Raises:
        UsageError: the environment variable names no such path.
    """
    return _parsed(_chosen())


def is_enabled(name: str) -> bool:
    """Whether the path `name` is on. Raises as `enabled` does."""
    assert name in PATHS, name
    return name in enabled()


def reason_off() -> str:
    """Why a path is off that is not on: the setting and its place."""
    choice = _chosen()
    return f"switched off ({choice.source}: {choice.setting})"


def _chosen() -> _Choice:
    return _choice.get() or _Choice(os.environ.get(VARIABLE, ""), VARIABLE)


@lru_cache(maxsize=64)
def _parsed(choice: _Choice) -> frozenset[str]:
    items = [item.strip() for item in choice.setting.split(",") if item.strip()]
    if items in ([], ["auto"]):
        return frozenset(PATHS)
    if items == ["off"]:
        return frozenset()
    for item in items:
        if (name := item.removeprefix("-")) not in PATHS:
            hint = did_you_mean(name, PATHS) or f" There are {', '.join(PATHS)}."
            if name in ("auto", "off"):
                hint = " auto and off stand alone."
            raise UsageError(f"{choice.source}: there is no fast path '{name}'.{hint}")
    named = {item for item in items if not item.startswith("-")}
    excluded = {item.removeprefix("-") for item in items if item.startswith("-")}
    return frozenset(named or PATHS) - excluded
