"""The accelerator of a `PPOTrainer`, made from its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ppo_cli.config.trackers import as_names
from ppo_cli.errors import UsageError, did_you_mean, is_out_of_memory
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.sharding import settle_sharding, with_sharding
from ppo_cli.ppo.trackers import check_logging_dir, check_trackers, start_trackers
from ppo_cli.utils import launcher
from ppo_cli.utils.device import mixed_precision, resolve_device
from ppo_cli.utils.hub import first_line


def require(name: str, value: Any, types: type | tuple[type, ...], hint: str = "") -> None:
    """Raise `ValueError` unless `value` is of one of `types`; the message ends with `hint`."""
    if not isinstance(value, types):
        names = [t.__name__ for t in (types if isinstance(types, tuple) else (types,))]
        raise ValueError(f"{name} must be a {' or '.join(names)}, got {type(value).__name__}{hint}")


def make_accelerator(config: PPOConfig) -> Accelerator:
    """An accelerator; the trackers of `log_with` are started.

    Raises:
        MissingPackageError: a tracker's package is missing.
        UsageError: accelerate or the tracker refuses a keyword argument, the device does not have
            the precision, a launcher started processes that accelerate does not see, or sharding
            was asked for that is not done.
        PPOCliError: a tracker does not start.
    """
    _check_keywords("accelerator_kwargs", config.accelerator_kwargs, Accelerator)
    _check_keywords("project_kwargs", config.project_kwargs, ProjectConfiguration)
    names = as_names(config.log_with)
    check_trackers(config)
    check_logging_dir(config)
    settings = _for_processes(config.accelerator_kwargs)
    if settings.get("mixed_precision") is not None:
        device = torch.device("cpu") if settings.get("cpu") else resolve_device("auto")
        settings["mixed_precision"] = mixed_precision(settings["mixed_precision"], device)
    with _refusals("project_kwargs", config.project_kwargs):
        project = ProjectConfiguration(**config.project_kwargs)
    settings = with_sharding(settings)
    with _refusals("accelerator_kwargs", config.accelerator_kwargs):
        accelerator = Accelerator(log_with=names or None, project_config=project, **settings)
    _check_processes(accelerator)
    settle_sharding(accelerator, settings)
    if names:
        start_trackers(accelerator, config)
    return accelerator


def _for_processes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Accelerator` for the processes that a launcher may have started."""
    settings = dict(given)
    if launcher.count() > 1 and not (torch.cuda.is_available() or torch.xpu.is_available()):
        settings.setdefault("cpu", True)  # without it accelerate sees one process
    return settings


def _check_processes(accelerator: Accelerator) -> None:
    """Raise `UsageError` where accelerate does not have the processes that were started."""
    if (launched := launcher.count()) != accelerator.num_processes:
        raise UsageError(
            f"a launcher started {launched} processes, but accelerate uses "
            f"{accelerator.num_processes}: each would train by itself. Pass "
            "accelerator_kwargs={'cpu': True} for processors, or make the accelerator after the "
            "launcher's variables (WORLD_SIZE, RANK, LOCAL_RANK) are set"
        )


def _check_keywords(key: str, given: dict[str, Any], function: Any) -> None:
    """Raise `UsageError` where a setting holds an argument that `function` does not have."""
    ours = ("log_with", "project_config")  # made from other settings
    known = [name for name in signature(function).parameters if name not in ours]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known) or f" There are {', '.join(known)}"
            raise UsageError(f"ppo.{key}: there is no '{name}'.{near}")


@contextmanager
def _refusals(key: str, given: dict[str, Any]) -> Iterator[None]:
    """Turn an error of accelerate about the arguments in a setting into a `UsageError`."""
    try:
        yield
    except Exception as error:
        if not given or is_out_of_memory(error):
            raise
        raise UsageError(f"ppo.{key}: {first_line(error)}") from error


def record_surroundings(config: PPOConfig, accelerator: Accelerator, model: Any) -> None:
    """Fill in the fields of `config` that depend on the processes and the model."""
    config.world_size = accelerator.num_processes
    config.global_batch_size = config.batch_size * config.world_size
    config.global_backward_batch_size = config.backward_batch_size * config.world_size
    config.is_encoder_decoder = model.is_encoder_decoder
    config.is_peft_model = model.is_peft_model
