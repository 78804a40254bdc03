"""Import transformers without torch's compiler and sharded tensors.

transformers imports `torch._dynamo`, for decorators that mark functions for the compiler, and
`torch.distributed.tensor`, for sharded models. With their own imports, such as sympy, these two
take half of the time to import a model, and 80 MB. A command that only samples needs neither.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ppo_cli.kernels.switch import is_enabled

COMPILER = "torch._dynamo"
STANDALONE = "torch._dynamo._trace_wrapped_higher_order_op"  # attention masks need this module
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
SHARDING_CHECK = "is_torch_distributed_available"
MODULES = ("transformers.modeling_utils", "transformers.generation.utils")
"""Modules that every model imports, and that import the compiler."""


@contextmanager
def light_imports() -> Iterator[None]:
    """Import transformers inside the block without sharding; import the compiler when it is used.

    `_LazyCompiler` takes the place of `torch._dynamo` in `sys.modules`. The modules imported inside
    cannot shard models until the process ends, so this is for commands only. Nothing is changed if
    the path `imports` is off, if the compiler or transformers' models are imported already, or if
    the installed releases cannot be imported in this way.
    """
    is_too_late = COMPILER in sys.modules or MODULES[0] in sys.modules
    if is_too_late or not is_enabled("imports"):
        yield
        return
    import torch
    from transformers import utils

    before = set(sys.modules)
    with ExitStack() as restore:
        for module in (utils, utils.import_utils):
            if hasattr(module, SHARDING_CHECK):
                restore.callback(setattr, module, SHARDING_CHECK, getattr(module, SHARDING_CHECK))
                setattr(module, SHARDING_CHECK, lambda: False)
        try:
            _put_stand_in(torch)
            for name in MODULES:
                import_module(name)
        except Exception:  # of any kind: it depends on the release
            _undo(torch, before)
            restore.close()
        yield


def _put_stand_in(torch: Any) -> None:
    """Put a `_LazyCompiler` in place of the compiler."""
    sys.modules[COMPILER] = _LazyCompiler(Path(torch.__file__).parent / "_dynamo")
    sys.meta_path.insert(0, _CompilerFinder())
    vars(torch.distributed).setdefault("__getattr__", _part_of_distributed)


def _undo(torch: Any, before: set[str]) -> None:
    """Remove the stand-in, and the modules of transformers that were imported after `before`."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _CompilerFinder)]
    if isinstance(sys.modules.get(COMPILER), _LazyCompiler):
        del sys.modules[COMPILER]
    if vars(torch.distributed).get("__getattr__") is _part_of_distributed:
        del torch.distributed.__getattr__
    # These modules lack what modules imported from now on expect for sharding.
    for name in set(sys.modules) - before:
        if name.startswith("transformers."):
            module = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            attributes = vars(sys.modules.get(parent, module))
            if attributes.get(child) is module:
                del attributes[child]


class _LazyCompiler(ModuleType):
    """A stand-in for `torch._dynamo` that imports it on access to anything but a decorator.

    Its decorators return functions unchanged, which makes a difference to the compiler only.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(COMPILER)
        self.__path__ = [str(folder)]

    def __getattr__(self, name: str) -> Any:
        if name in DECORATORS:
            return _unchanged
        if name.startswith("__"):
            raise AttributeError(f"module {COMPILER!r} has no attribute {name!r}")
        return getattr(self.load(), name)

    def load(self) -> ModuleType:
        """Import the compiler, which takes this module's place."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return import_module(COMPILER)


class _CompilerFinder(MetaPathFinder, Loader):
    """Imports the compiler before any of its submodules, except the standalone one."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        compiler = sys.modules.get(COMPILER)
        is_part = name.startswith(f"{COMPILER}.") and name != STANDALONE
        if not (is_part and isinstance(compiler, _LazyCompiler)):
            return None
        compiler.load()
        return ModuleSpec(name, self) if name in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module, which was imported with the compiler."""
        module = sys.modules[spec.name]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own specification; it is executed already."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _part_of_distributed(name: str) -> ModuleType:
    """Import a submodule of `torch.distributed`, such as `tensor`, when it is accessed.

    Some packages, such as peft, access these without importing them.
    """
    if not name.startswith("_"):
        with suppress(ModuleNotFoundError):
            return import_module(f"torch.distributed.{name}")
    raise AttributeError(f"module 'torch.distributed' has no attribute {name!r}")


def _unchanged(function: Callable | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that returns the function itself."""
    return _unchanged if function is None else function
