"""Steer a language model's sentiment with Proximal Policy Optimization.

The Python face of the project. Names are imported when they are used, because torch and
transformers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_cli.cli.notebook import train
    from ppo_cli.data.prompts import LengthSampler
    from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
    from ppo_cli.models.reference import create_reference_model
    from ppo_cli.models.seq2seq import AutoModelForSeq2SeqLMWithValueHead
    from ppo_cli.ppo.best_of_n_sampler import BestOfNSampler
    from ppo_cli.ppo.config import PPOConfig
    from ppo_cli.ppo.statistics import print_ppo_stats
    from ppo_cli.ppo.text_environment import TextEnvironment, TextHistory
    from ppo_cli.ppo.trainer import PPOTrainer
    from ppo_cli.rewards.reward_sum import RewardSum
    from ppo_cli.rewards.sentiment import SentimentReward
    from ppo_cli.utils.random_state import set_seed

__version__ = "0.1.0"

_HOMES = {
    "AutoModelForCausalLMWithValueHead": "ppo_cli.models.policy",
    "AutoModelForSeq2SeqLMWithValueHead": "ppo_cli.models.seq2seq",
    "BestOfNSampler": "ppo_cli.ppo.best_of_n_sampler",
    "LengthSampler": "ppo_cli.data.prompts",
    "PPOConfig": "ppo_cli.ppo.config",
    "PPOTrainer": "ppo_cli.ppo.trainer",
    "RewardSum": "ppo_cli.rewards.reward_sum",
    "SentimentReward": "ppo_cli.rewards.sentiment",
    "TextEnvironment": "ppo_cli.ppo.text_environment",
    "TextHistory": "ppo_cli.ppo.text_environment",
    "create_reference_model": "ppo_cli.models.reference",
    "print_ppo_stats": "ppo_cli.ppo.statistics",
    "set_seed": "ppo_cli.utils.random_state",
    "train": "ppo_cli.cli.notebook",
}

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "RewardSum",
    "SentimentReward",
    "TextEnvironment",
    "TextHistory",
    "create_reference_model",
    "print_ppo_stats",
    "set_seed",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppo_cli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
