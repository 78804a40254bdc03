"""Experiment trackers: Weights & Biases and TensorBoard, through accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from ppo_cli.errors import MissingPackageError, PPOCliError, UsageError
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.utils.hub import first_line

TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard", "tensorboardX"]}
"""Tracker -> packages, of which one is enough."""


def check_tracker(name: str, config: PPOConfig) -> None:
    """Check that a tracker can be used with these settings.

    Raises:
        MissingPackageError: its package is missing.
        UsageError: arguments of another tracker, or no folder for tensorboard.
    """
    if not any(map(_is_installed, TRACKERS[name])):
        raise MissingPackageError(f"ppo.log_with={name} needs: pip install {name}")
    if others := [key for key in config.tracker_kwargs if key != name]:
        raise UsageError(
            f"ppo.tracker_kwargs: '{others[0]}' is not the tracker (ppo.log_with={name}): put its "
            f"arguments under '{name}'"
        )
    if name == "tensorboard" and not (
        {"logging_dir", "project_dir"} & set(config.project_kwargs)
        or config.accelerator_kwargs.get("project_dir")
    ):
        raise UsageError(
            "ppo.log_with=tensorboard needs a folder to write to: set "
            "'ppo.project_kwargs={logging_dir: FOLDER}'"
        )


def _is_installed(package: str) -> bool:
    try:  # as accelerate does: a folder of that name, such as wandb makes, is no package
        return find_spec(package) is not None and bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def start_tracker(accelerator: Accelerator, name: str, config: PPOConfig) -> None:
    """Start a tracker and log the configuration.

    Raises:
        PPOCliError: the tracker does not start.
    """
    logged: dict[str, Any] = {k: v for k, v in config.to_dict().items() if v is not None}
    if name == "wandb":
        logged = {"trl_ppo_trainer_config": logged}
    try:
        accelerator.init_trackers(
            config.tracker_project_name, config=logged, init_kwargs=config.tracker_kwargs
        )
    except Exception as error:
        raise PPOCliError(
            f"ppo.log_with={name}: the tracker does not start: {first_line(error).rstrip('. ')}. "
            "Change ppo.tracker_kwargs or ppo.project_kwargs, or set ppo.log_with=null"
        ) from error


def tracker_logs(
    tracker: str,
    stats: Mapping[str, Any],
    batch: Mapping[str, Any],
    scores: Tensor,
    columns: Sequence[str],
) -> dict[str, Any]:
    """What a tracker logs for a step: arguments as in `PPOTrainer.log_stats`.

    Raises:
        ValueError: with wandb, a column is not in the batch.
    """
    logs: dict[str, Any] = dict(stats)
    logs["env/reward_mean"] = scores.mean().item()
    logs["env/reward_std"] = scores.std().item() if len(scores) > 1 else 0.0
    logs["env/reward_dist"] = scores.numpy()
    if tracker != "wandb":
        return {key: value for key, value in logs.items() if np.size(value) == 1}
    import wandb

    if missing := [column for column in columns if column not in batch]:
        raise ValueError(f"columns {missing} to log are not in the batch: {list(batch)}")
    rows = [list(row) for row in zip(*(batch[c] for c in columns), scores.tolist(), strict=True)]
    logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=rows)
    return logs
