"""Warnings about the statistics of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_cli.config.ppo import PPOSettings


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
