"""The dataloader that `PPOTrainer` makes of a dataset."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ppo_cli.errors import UsageError
from ppo_cli.ppo.config import PPOConfig


def make_dataloader(
    dataset: Any, config: PPOConfig, model: torch.nn.Module, data_collator: Callable | None
) -> DataLoader:
    """Batches of rows; see `PPOTrainer.prepare_dataloader`.

    Args:
        dataset: rows with the queries.
        config: `batch_size`, `seed` and `remove_unused_columns` are read.
        model: its forward says which columns are used.
        data_collator: collates rows into a batch; None for torch's.

    Raises:
        UsageError: the dataset is none, or has no rows.
    """
    _check_dataset(dataset)
    if config.remove_unused_columns and hasattr(dataset, "remove_columns"):
        used = {*inspect.signature(model.forward).parameters, "label", "query", "response"}
        found = dataset.column_names or list(next(iter(dataset), {}))  # of a stream without names
        dataset = dataset.remove_columns([c for c in found if c not in used])
    settings: dict[str, Any] = {"batch_size": config.batch_size, "collate_fn": data_collator}
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, drop_last=True, **settings)
    if len(dataset) < config.batch_size:
        warnings.warn(
            f"the dataset has {len(dataset)} rows, fewer than batch_size "
            f"({config.batch_size}): the dataloader is empty",
            stacklevel=4,
        )
    return DataLoader(
        dataset,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(config.seed),
        **settings,
    )


def _check_dataset(dataset: Any) -> None:
    """Raise `UsageError` unless a dataset has rows, which are read by number or one by one."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise UsageError(
            f"dataset is a {kind} with the splits {', '.join(map(str, dataset))}: pass one of them"
        )
    if isinstance(dataset, DataLoader):
        raise UsageError(
            "dataset is a DataLoader: pass the rows that it reads, or leave dataset out and go "
            "through trainer.accelerator.prepare(dataloader)"
        )
    if isinstance(dataset, IterableDataset):
        return
    if isinstance(dataset, str) or not {"__getitem__", "__len__"} <= {*dir(dataset)}:
        raise UsageError(f"dataset must have rows, as a Dataset or a list has them, got {kind}")
    if len(dataset) == 0:
        raise UsageError("dataset has no rows")
