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
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    own = {k: t.detach() for k, t in tensors.items() if is_part(t) or processes.is_main()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(own, storage_writer=writer, no_dist=False)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors that the files in a folder hold, as empty ones: names, shapes, types."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
    }


def read_shards(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Read tensors of a folder into those that are there, whole or this process's parts.

    The files may be shards, or hold whole tensors.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    places: dict[str, Any] = {name: target.detach() for name, target in targets.items()}
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():  # that this process reads for itself
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(places, storage_reader=reader, no_dist=True)
