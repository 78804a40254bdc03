"""The tensors of a checkpoint in parts: each process writes its own, any number reads them.

The files are those of `torch.distributed.checkpoint` in safetensors, without pickles. A process
reads what it needs of all of them, so it need not be one of as many as wrote them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_cli.utils import processes


def is_part(value: Any) -> bool:
    """Whether a tensor is sharded (a `DTensor`), and this process has a part of it."""
    return hasattr(value, "full_tensor")


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's parts of tensors into a folder. All processes call it.

    Args:
        folder: exists.
        tensors: whole tensors, of which the main process's are taken, and sharded ones.

    Raises:
        Exception: what writing raised on one of the processes, on all of them.
    """
    from torch.distributed import checkpoint as dcp

    own = {k: t.detach() for k, t in tensors.items() if is_part(t) or processes.is_main()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(own, storage_writer=writer, no_dist=False)
    except dcp.CheckpointException as error:  # type: ignore[attr-defined]
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors that the files in a folder hold, as empty ones: names, shapes, types."""
    from torch.distributed import checkpoint as dcp

    found: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
    }


def read_shards(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Read tensors of a folder into those that are there, whole or this process's parts.

    The files may be shards, or hold whole tensors.
    """
    from torch.distributed import checkpoint as dcp

    places: dict[str, Any] = {name: target.detach() for name, target in targets.items()}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():  # that this process reads for itself
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(places, storage_reader=reader, no_dist=True)
