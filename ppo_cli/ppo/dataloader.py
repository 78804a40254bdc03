"""The dataloader that `PPOTrainer` makes of a dataset."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ppo_cli.ppo.config import PPOConfig


def make_dataloader(
    dataset: Any, config: PPOConfig, model: torch.nn.Module, data_collator: Callable | None
) -> torch.utils.data.DataLoader:
    """Shuffled batches; see `PPOTrainer.prepare_dataloader`.

    Args:
        dataset: rows with the queries.
        config: `batch_size`, `seed` and `remove_unused_columns` are read.
        model: its forward says which columns are used.
        data_collator: collates rows into a batch; None for torch's.
    """
    if config.remove_unused_columns and hasattr(dataset, "remove_columns"):
        used = {*inspect.signature(model.forward).parameters, "label", "query", "response"}
        dataset = dataset.remove_columns([c for c in dataset.column_names if c not in used])
    if len(dataset) < config.batch_size:
        warnings.warn(
            f"the dataset has {len(dataset)} rows, fewer than batch_size "
            f"({config.batch_size}): the dataloader is empty",
            stacklevel=4,
        )
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=config.batch_size,
        collate_fn=data_collator,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(config.seed),
    )
