"""The results in a run directory: model, picture, model card, best-of-n."""

from __future__ import annotations

from typing import Any

from ppo_cli.config.schema import RunConfig
from ppo_cli.models.model_card import task_of
from ppo_cli.models.saving import save_folder
from ppo_cli.reporting.model_card import run_card
from ppo_cli.reporting.plots import DEFAULT_METRICS, plot_training
from ppo_cli.reporting.summary import TrainingSummary
from ppo_cli.training.run_directory import CARD_FILE, RunDirectory
from ppo_cli.utils.files import write_text


def save_model(directory: RunDirectory, policy: Any, tokenizer: Any, config: RunConfig) -> None:
    """Write the policy as a model folder, and the picture of loss and mean reward."""
    adapter = config.policy.adapter
    save_folder(policy, tokenizer, directory.inventory, adapter.save if adapter else None)
    rows = [row for row in directory.records.rows() if row.keys() >= set(DEFAULT_METRICS)]
    if rows:
        plot_training({directory.path.name: rows}, directory.plot)


def write_card(
    directory: RunDirectory, summary: TrainingSummary, config: RunConfig, policy: Any
) -> None:
    """Write the model card."""
    directory.inventory.add([CARD_FILE])
    inputs = directory.recorded().get("inputs") or {}
    card = run_card(summary, config, inputs, task_of(policy))
    write_text(directory.path / CARD_FILE, card)
