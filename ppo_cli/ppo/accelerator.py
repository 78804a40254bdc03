"""What `PPOTrainer`'s constructor needs around accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from ppo_cli.errors import (
    MissingPackageError,
    PPOCliError,
    UsageError,
    did_you_mean,
    is_out_of_memory,
)
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.utils.device import mixed_precision, resolve_device
from ppo_cli.utils.hub import first_line

TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard", "tensorboardX"]}
"""Tracker -> packages of which one will do."""


def require(name: str, value: Any, types: type | tuple[type, ...]) -> None:
    """Raise `ValueError` unless `value` is of one of `types`."""
    if not isinstance(value, types):
        names = [t.__name__ for t in (types if isinstance(types, tuple) else (types,))]
        raise ValueError(f"{name} must be a {' or '.join(names)}, got {type(value).__name__}")


def make_accelerator(config: PPOConfig) -> Accelerator:
    """An accelerator, with the tracker that `log_with` names started.

    Raises:
        MissingPackageError: the tracker's package is missing.
        UsageError: a keyword argument that accelerate or the tracker does not take, or a precision
            that the device does not have.
        PPOCliError: the tracker does not start.
    """
    _check_keywords("accelerator_kwargs", config.accelerator_kwargs, Accelerator)
    _check_keywords("project_kwargs", config.project_kwargs, ProjectConfiguration)
    if config.log_with is not None:
        _check_tracker(config.log_with, config)
    settings = dict(config.accelerator_kwargs)
    if settings.get("mixed_precision") is not None:
        device = torch.device("cpu") if settings.get("cpu") else resolve_device("auto")
        settings["mixed_precision"] = mixed_precision(settings["mixed_precision"], device)
    with _refusals("project_kwargs", config.project_kwargs):
        project = ProjectConfiguration(**config.project_kwargs)
    with _refusals("accelerator_kwargs", config.accelerator_kwargs):
        accelerator = Accelerator(log_with=config.log_with, project_config=project, **settings)
    if config.log_with is not None:
        _start_tracker(accelerator, config.log_with, config)
    return accelerator


def _check_keywords(key: str, given: dict[str, Any], function: Any) -> None:
    """Raise `UsageError` where a setting holds an argument that `function` does not have."""
    ours = ("log_with", "project_config")  # made of other settings
    known = [name for name in signature(function).parameters if name not in ours]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known) or f" There are {', '.join(known)}"
            raise UsageError(f"ppo.{key}: there is no '{name}'.{near}")


def _check_tracker(name: str, config: PPOConfig) -> None:
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
    try:  # as accelerate asks: a folder of that name, such as wandb makes, is no package
        return find_spec(package) is not None and bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _start_tracker(accelerator: Accelerator, name: str, config: PPOConfig) -> None:
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


@contextmanager
def _refusals(key: str, given: dict[str, Any]) -> Iterator[None]:
    """What accelerate has against the arguments that a setting holds, as a `UsageError`."""
    try:
        yield
    except Exception as error:
        if not given or is_out_of_memory(error):
            raise
        raise UsageError(f"ppo.{key}: {first_line(error)}") from error


def record_surroundings(config: PPOConfig, accelerator: Accelerator, is_peft: bool) -> None:
    """Fill in the fields of `config` that follow from where it runs."""
    config.world_size = accelerator.num_processes
    config.global_batch_size = config.batch_size * config.world_size
    config.global_backward_batch_size = config.backward_batch_size * config.world_size
    config.is_encoder_decoder = False
    config.is_peft_model = is_peft


def prepare_reference(reference: Any, accelerator: Accelerator) -> Any:
    """Place the reference where the policy is, sharded where that is sharded, in eval mode.

    None, the reference of a policy with an adapter, stays None.
    """
    if reference is None:
        return None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(reference, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        from trl.models import prepare_fsdp

        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True).eval()
