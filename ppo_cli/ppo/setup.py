"""What `PPOTrainer`'s constructor needs around accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from ppo_cli.ppo.config import PPOConfig
from ppo_cli.runtime import mixed_precision, resolve_device


def require(name: str, value: Any, types: type | tuple[type, ...]) -> None:
    """Raise `ValueError` unless `value` is of one of `types`."""
    if not isinstance(value, types):
        names = [t.__name__ for t in (types if isinstance(types, tuple) else (types,))]
        raise ValueError(f"{name} must be a {' or '.join(names)}, got {type(value).__name__}")


def make_accelerator(config: PPOConfig) -> Accelerator:
    """An accelerator, with the tracker that `log_with` names started.

    Raises:
        ImportError: the tracker's package is missing.
        UsageError: a precision that the device does not have.
    """
    if config.log_with is not None and find_spec(config.log_with) is None:
        raise ImportError(f"log_with='{config.log_with}' needs: pip install {config.log_with}")
    settings = dict(config.accelerator_kwargs)
    if settings.get("mixed_precision") is not None:
        device = torch.device("cpu") if settings.get("cpu") else resolve_device("auto")
        settings["mixed_precision"] = mixed_precision(settings["mixed_precision"], device)
    accelerator = Accelerator(
        log_with=config.log_with,
        project_config=ProjectConfiguration(**config.project_kwargs),
        **settings,
    )
    if config.log_with is not None:
        logged: dict[str, Any] = {k: v for k, v in config.to_dict().items() if v is not None}
        if config.log_with == "wandb":
            logged = {"trl_ppo_trainer_config": logged}
        accelerator.init_trackers(
            config.tracker_project_name, config=logged, init_kwargs=config.tracker_kwargs
        )
    return accelerator


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
