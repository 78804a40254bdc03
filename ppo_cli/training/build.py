"""What a run needs before its first step: the trainer, and lengths that its model can read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.prompts import Prompt
from ppo_cli.errors import DataError
from ppo_cli.models.capabilities import rope_switch
from ppo_cli.models.context import context_length
from ppo_cli.models.loading import load_policy
from ppo_cli.models.sampling import check_sampling
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.forward import check_reading
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.utils.device import accelerator_settings


def make_trainer(
    config: RunConfig, device: torch.device, tokenizer: Any, trusted: Collection[str]
) -> PPOTrainer:
    """The trainer that a configuration describes, its policy loaded."""
    settings = dataclasses.asdict(config.ppo)
    settings["accelerator_kwargs"] = {
        **accelerator_settings(device),
        "mixed_precision": config.policy.precision,
        **config.ppo.accelerator_kwargs,
    }
    return PPOTrainer(
        PPOConfig(
            **settings,
            seed=config.run.seed,
            temperature=config.rollout.temperature,
            model_name=config.policy.model,
            query_dataset=config.prompts.source,
            reward_model=config.reward.model,
            steps=config.run.steps * config.ppo.batch_size,
        ),
        load_policy(config.policy, tokenizer, trusted),
        None,
        tokenizer,
        num_shared_layers=config.policy.num_shared_layers,
    )


def try_models(trainer: PPOTrainer) -> None:
    """See that what will be computed is what policy and reference say, before anything is written.

    Raises:
        UsageError: the policy looks ahead, so it is not causal.
        ModelError: it cannot be sampled from, or read, in any way that is right.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    check_sampling(policy, trainer.tokenizer.pad_token_id)
    for model in filter(None, (trainer.model, trainer.ref_model)):
        check_reading(model)


def check_context(config: RunConfig, model: Any, prompts: Sequence[Prompt]) -> None:
    """Raise `DataError` where queries and responses have lengths that do not suit the model.

    They are longer than it can read, or cross the length from which on it turns all positions
    otherwise: then what is sampled token by token is not what it says of the whole.
    """
    context = context_length(model)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    new = config.rollout.output_max_length - 1
    if context is not None and longest + new > context:
        raise DataError(
            f"queries of up to {longest} tokens and responses of up to {new} exceed the "
            f"model's context of {context}: lower prompts.input_max_text_length or "
            "rollout.output_max_length"
        )
    switch = rope_switch(model.config)
    if switch is not None and any(
        len(prompt.input_ids) <= switch < len(prompt.input_ids) + new for prompt in prompts
    ):
        raise DataError(
            f"some queries (of up to {longest} tokens) with their responses (of up to {new}) cross "
            f"{switch} tokens, from which on the model's positions turn otherwise (longrope), so "
            "their samples would not be the policy's: keep both below that with a lower "
            "prompts.input_max_text_length, or all queries above it"
        )
