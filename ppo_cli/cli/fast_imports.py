"""transformers without what it imports for compilers and for models spread over processes.

transformers imports `torch._dynamo` for decorators that tell a compiler what to do with a function,
and `torch.distributed.tensor` for sharded models. With sympy and the rest that these two import in
turn they are half of what importing a model takes, and 80 MB. A command that only samples from
models needs neither.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ppo_cli.kernels.switch import is_enabled

COMPILER = "torch._dynamo"
INDEPENDENT = "torch._dynamo._trace_wrapped_higher_order_op"  # what attention masks need of it
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
ASKED = "is_torch_distributed_available"
MODULES = ("transformers.modeling_utils", "transformers.generation.utils")
"""What models import of transformers, which imports the compiler."""


@contextmanager
def light_imports() -> Iterator[None]:
    """What is imported of transformers inside does not shard models; the compiler comes when used.

    It is for a process of our own: such a module stays that way until the process ends. Nothing is
    changed where the path `imports` is off, where transformers' models or the compiler have been
    imported already, or where a release of torch or transformers cannot be imported that way.
    """
    there = COMPILER in sys.modules or MODULES[0] in sys.modules
    if there or not is_enabled("imports"):
        yield
        return
    import torch
    from transformers import utils

    before = set(sys.modules)
    homes = [home for home in (utils, utils.import_utils) if hasattr(home, ASKED)]
    answers = [getattr(home, ASKED) for home in homes]
    for home in homes:
        setattr(home, ASKED, lambda: False)
    try:
        try:
            _put_stand_in(torch)
            for name in MODULES:
                import_module(name)
        except Exception:  # whatever another release raises
            _undo(before)
            for home, answer in zip(homes, answers, strict=True):
                setattr(home, ASKED, answer)
        yield
    finally:
        for home, answer in zip(homes, answers, strict=True):
            setattr(home, ASKED, answer)


def _put_stand_in(torch: Any) -> None:
    """Let a `_LazyCompiler` take the compiler's place."""
    sys.modules[COMPILER] = _LazyCompiler(Path(torch.__file__).parent / "_dynamo")
    sys.meta_path.insert(0, _CompilerFinder())
    vars(torch.distributed).setdefault("__getattr__", _part_of_distributed)


def _undo(before: set[str]) -> None:
    """Take the stand-in away, and have transformers imported anew but for modules of `before`."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _CompilerFinder)]
    if isinstance(sys.modules.get(COMPILER), _LazyCompiler):
        del sys.modules[COMPILER]
    # They were imported as if models were never sharded, which others count on.
    for name in set(sys.modules) - before:
        if name.startswith("transformers."):
            module = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            attributes = vars(sys.modules.get(parent, module))
            if attributes.get(child) is module:
                del attributes[child]


class _LazyCompiler(ModuleType):
    """`torch._dynamo`, not imported until it is asked for more than a decorator.

    Decorators leave functions as they are, which a compiler alone would notice.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(COMPILER)
        self.__path__ = [str(folder)]

    def __getattr__(self, name: str) -> Any:
        if name in DECORATORS:
            return _unchanged
        if name.startswith("__"):
            raise AttributeError(f"module {COMPILER!r} has no attribute {name!r}")
        return getattr(self.imported(), name)

    def imported(self) -> ModuleType:
        """The compiler itself, in this module's place from now on."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return import_module(COMPILER)


class _CompilerFinder(MetaPathFinder, Loader):
    """Whoever imports a module below the compiler, but the one without it, has the compiler too."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        compiler = sys.modules.get(COMPILER)
        is_part = name.startswith(f"{COMPILER}.") and name != INDEPENDENT
        if not (is_part and isinstance(compiler, _LazyCompiler)):
            return None
        compiler.imported()
        return ModuleSpec(name, self) if name in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that came with the compiler."""
        module = sys.modules[spec.name]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _part_of_distributed(name: str) -> ModuleType:
    """`torch.distributed.tensor` and the like, for who counts on their import, as peft does."""
    if not name.startswith("_"):
        with suppress(ModuleNotFoundError):
            return import_module(f"torch.distributed.{name}")
    raise AttributeError(f"module 'torch.distributed' has no attribute {name!r}")


def _unchanged(function: Callable | None = None, *_: Any, **__: Any) -> Any:
    """As a decorator, with arguments or without: the function itself."""
    return _unchanged if function is None else function
