"""The switch of the fast paths.

The environment variable `PPO_CLI_KERNELS` says which paths are on; without it a run's
`policy.kernels` does. A path that is on is taken if it suits the machine and the model. Values:

- `auto`, or empty: all paths;
- `off`: no path, which leaves plain torch and transformers;
- names: these paths only, such as `matmul,lm_head`;
- names with a minus: all paths except these, such as `-packing`.

In Python code `using` sets the value for a block. This module imports only the standard library.
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
    "attention": "attention by matrix products over short rows (CPU, bfloat16); no cuDNN on a GPU",
    "lm_head": "the vocabulary projection at the positions needed, in pieces",
    "tied_embeddings": "one gradient for tied embeddings (with lm_head)",
    "packing": "several sequences in one row",
    "decode_loop": "sampling by ppo-cli's own loop in place of `generate`",
    "kv_cache": "a cache of keys and values that is allocated once (with decode_loop)",
    "cuda_graph": "sampling steps recorded and replayed on a CUDA GPU (with kv_cache)",
    "optimizer_in_backward": "the optimizer updates each weight during the backward pass",
    "kernel_caches": "oneDNN keeps the compiled kernels of about one batch only",
    "imports": "`generate` and `compare` import transformers without torch's compiler",
    "gelu": "GELU's tanh approximation by one kernel of torch in place of transformers' formula",
}
"""Name -> what the path does."""


class _Choice(NamedTuple):
    """A value of the switch, and what set it."""

    setting: str
    source: str


_choice: ContextVar[_Choice | None] = ContextVar("kernels", default=None)


@contextmanager
def using(setting: str, source: str = "using") -> Iterator[None]:
    """Set the switch inside a `with` block, for this thread. It overrides the environment.

    The switch counts when a policy samples or learns, not when it or its trainer is made. The
    exception is `gelu`: the activations of a model are replaced when a policy is made of it.

    Args:
        setting: a value as of `PPO_CLI_KERNELS`.
        source: name of the setting in reports and errors.

    Raises:
        UsageError: `setting` names a path that does not exist.
    """
    choice = _Choice(setting, source)
    _parsed(choice)
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def configured(setting: str) -> AbstractContextManager[None]:
    """`using(setting)` for a run's `policy.kernels`, unless the environment variable is set.

    Raises:
        UsageError: the environment variable names a path that does not exist.
    """
    if not os.environ.get(VARIABLE):
        return using(setting, "policy.kernels")
    enabled()
    return nullcontext()


def enabled() -> frozenset[str]:
    """Names of the paths that are on.

    Raises:
        UsageError: the environment variable names a path that does not exist.
    """
    return _parsed(_chosen())


def is_enabled(name: str) -> bool:
    """Whether the path `name` is on. Raises as `enabled` does."""
    assert name in PATHS, name
    return name in enabled()


def reason_off() -> str:
    """The value of the switch and what set it, for a path that is off."""
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
