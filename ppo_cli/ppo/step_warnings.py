"""Warnings about what is going to train, and about the statistics of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.ppo.optimizer_step import stepped_parameters


def step_warnings(stats: Mapping[str, Any], config: PPOSettings) -> dict[str, str]:
    """Messages about negative KL and skipped mini-batches, under a name for each kind."""
    warnings = {}
    if stats["objective/kl"] < -1.0:
        warnings["KL"] = (
            f"KL is negative ({stats['objective/kl']:.2f} per sequence): the responses are "
            "not samples of this policy. Sample with temperature 1, without top-k or top-p"
        )
    if stats.get("ppo/policy/skipped", 0.0) > 0:  # a replaced loss may leave it out
        warnings["skipped"] = (
            "the mean ratio of a mini-batch exceeds ratio_threshold "
            f"({config.ratio_threshold:g}): its optimizer step is skipped. A lower "
            f"{config.step_size_key} or fewer ppo_epochs keep the policy closer"
        )
    return warnings


def training_warning(policy: AutoModelForCausalLMWithValueHead, optimizer: Any) -> str | None:
    """A message if no weight of the language model is going to move; None otherwise."""
    held = set(stepped_parameters(optimizer))
    if any(p.requires_grad and p in held for p in policy.pretrained_model.parameters()):
        return None
    heads = [p for p in policy.v_head.parameters() if p.requires_grad and p in held]
    cause = "adapter is frozen" if policy.is_peft_model else "weights are frozen"
    if any(p.requires_grad for p in policy.pretrained_model.parameters()):
        cause = "trainable weights are not in the optimizer"
    return (
        f"{'only the value head trains' if heads else 'nothing trains'}: the language model's "
        f"{cause}" + (" (is_trainable=True loads it to be trained)" if "adapter" in cause else "")
    )
