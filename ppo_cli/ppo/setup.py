"""What `PPOTrainer`'s constructor needs around accelerate."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from torch.optim.lr_scheduler import LambdaLR

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


def make_scheduler(
    config: PPOConfig, optimizer: torch.optim.Optimizer, processes: int
) -> LambdaLR | None:
    """The schedule that `lr_scheduler_type` and `warmup_steps` name; None where none is needed.

    It ends after `steps` samples. accelerate steps it once a process.
    """
    kind = config.lr_scheduler_type
    if kind == "adaptive" or (kind == "constant" and not config.warmup_steps):
        return None
    return LambdaLR(optimizer, lambda calls: learning_rate_factor(config, calls // processes))


def learning_rate_factor(config: PPOConfig, step: int) -> float:
    """What the learning rate is multiplied with in a step, counted from 0."""
    warmup, total = config.warmup_steps, config.total_ppo_epochs
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    falling = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.lr_scheduler_type]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * falling


def adapt_learning_rate(optimizer: torch.optim.Optimizer, moved: float, desired: float) -> None:
    """Slow down after a step that moved over twice as far as desired, speed up after a timid one.

    Args:
        optimizer: its groups' rates change by a factor of 1.5, or not at all.
        moved: what the step moved the policy by, nats per token.
        desired: the same as it should be.

    Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4, does so with the KL
    coefficient; Rudin et al. 2022 (https://arxiv.org/abs/2109.11978) with the learning rate.
    """
    factor = 1 / 1.5 if moved > 2 * desired else 1.5 if moved < desired / 2 else 1.0
    for group in optimizer.param_groups:
        group["lr"] *= factor


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
