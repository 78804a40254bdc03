"""Loads the classifier that a configuration names."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ppo_cli.config.reward import RewardConfig
from ppo_cli.data.embedded import classifier_folder
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.models.loading import source_keywords
from ppo_cli.rewards.sentiment import SentimentReward
from ppo_cli.utils.hub import trial_errors


def load_reward(
    config: RewardConfig,
    device: torch.device,
    sentiment: str | None = None,
    trusted: Collection[str] = (),
) -> SentimentReward:
    """The classifier of a configuration.

    Args:
        config: the section `reward`.
        device: the classifier's device.
        sentiment: the label, instead of the configured one.
        trusted: models, as `config` names them, whose own code may run.

    Raises:
        PPOCliError: it cannot be loaded, or does not score a text.
    """
    source = str(classifier_folder()) if config.model == EMBEDDED else config.model
    with trial_errors(config.model, "classifier"):
        reward = SentimentReward(
            source,
            sentiment or config.sentiment,
            output=config.output,
            batch_size=config.batch_size,
            device=device,
            **source_keywords(config.model, config.revision, trusted),
        )
        reward.scores(["a"])
    return reward
