"""A trainer in words and as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ppo_cli.ppo.statistics import STATISTICS, grouped
from ppo_cli.utils.html import folded, page, table, text

if TYPE_CHECKING:
    from ppo_cli.ppo.trainer import PPOTrainer

IMPORTANT = (
    "objective/kl", "objective/kl_coef", "ppo/loss/total", "ppo/mean_scores",
    "ppo/policy/approxkl", "ppo/policy/clipfrac", "ppo/val/var_explained", "ppo/learning_rate",
    "time/ppo/total",
)  # fmt: skip
"""Statistics that are not folded away."""


def description(trainer: PPOTrainer) -> dict[str, str]:
    """Models, device, sizes and progress of a trainer, by name."""
    config, accelerator = trainer.config, trainer.accelerator
    policy = accelerator.unwrap_model(trainer.model)
    parameters = list(policy.parameters())
    total = sum(each.numel() for each in parameters)
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    processes = accelerator.num_processes
    together = f", {processes} processes" if processes > 1 else ""
    mixed = accelerator.mixed_precision
    precision = f"{parameters[0].dtype}".removeprefix("torch.")
    precision += "" if mixed == "no" else f" computed in {mixed}"
    accumulated = config.gradient_accumulation_steps
    return {
        "policy": f"{_name(policy)}, {total:,} parameters, {trained:,} trained",
        "reference": "the policy without its adapter"
        if trainer.ref_model is None
        else _name(accelerator.unwrap_model(trainer.ref_model)),
        "device": f"{accelerator.device}, {precision}{together}",
        "batch": f"{config.batch_size} samples in mini-batches of {config.mini_batch_size}"
        + (f", {accumulated} an update" if accumulated > 1 else "")
        + f", {config.ppo_epochs} epochs",
        "steps": str(trainer.current_step),
    }


def trainer_html(trainer: PPOTrainer, statistics: Mapping[str, float]) -> str:
    """HTML of `description`, and of the newest step's statistics if there was a step."""
    about = table([(text(k, dim=True), text(v)) for k, v in description(trainer).items()], (), "l")
    if not statistics:
        return page("PPOTrainer", about)
    rows = [
        (text(key), text(f"{statistics[key]:.5g}"), text(STATISTICS[key].meaning, dim=True))
        for key in IMPORTANT
        if key in statistics
    ]
    groups = grouped(statistics, True) | grouped(statistics, False)
    others = [
        (text(key), text(f"{value:.5g}"), text(meaning, dim=True))
        for entries in groups.values()
        for key, value, meaning in entries
        if key not in IMPORTANT
    ]
    head = (text("statistic"), text(f"step {trainer.current_step}"), "")
    more = folded(f"{len(others)} other statistics", table(others, (), "lrl"))
    return page("PPOTrainer", about, table(rows, head, "lrl"), more)


def _name(model: Any) -> str:
    """Class and origin of a model, that with a value head by what it wraps."""
    inner = getattr(model, "pretrained_model", model)
    origin = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    return f"{type(inner).__name__}{f' ({origin})' if origin else ''}"
