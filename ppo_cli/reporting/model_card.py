"""The model card of a run: its origin, settings and results, and how to load the model."""

from __future__ import annotations

from typing import Any

from ppo_cli.evaluation import quality
from ppo_cli.models.model_card import HEADER, USAGE
from ppo_cli.utils.text import json_text, markdown_code, markdown_text


def run_card(summary: Any, config: Any) -> str:
    """Make the card of a run directory.

    Args:
        summary: a `TrainingSummary`.
        config: the run's `RunConfig`.
    """
    base = config.policy.model
    is_hub_id = not base.startswith((".", "/")) and "/" in base
    made = f"{summary.steps} of {summary.planned_steps} steps"
    unfinished = (
        "" if summary.steps == summary.planned_steps else f" The run was stopped after {made}."
    )
    if summary.stopped_early:
        unfinished = f" The run ended early, after {made}: {markdown_text(summary.stopped_early)}."
    label, plain = markdown_code(summary.label), markdown_text(summary.label)
    table = "\n".join(
        f"| {m.name.format(label=plain)} | {summary.before[m.key]:.{m.places}f} "
        f"| {summary.after[m.key]:.{m.places}f} | {m.meaning} |"
        for m in quality.MEASURES
    )
    examples = "\n".join(
        f"| {markdown_text(sample.query)} | {markdown_text(sample.response)} | {sample.score:.2f} |"
        for sample in summary.after_samples[:5]
    )
    ppo = f"{summary.steps} steps of {config.ppo.batch_size}"
    return (
        HEADER.format(base=f"base_model: {json_text(base)}\n" if is_hub_id else "")
        + f"""
# {markdown_text(summary.run)}

A language model tuned with Proximal Policy Optimization towards the sentiment
{label} by ppo-cli.{unfinished}

| | |
|---|---|
| policy | {markdown_code(base)} |
| classifier | {markdown_code(config.reward.model)}, label {label}, {config.reward.output} |
| prompts | {markdown_code(config.prompts.name)} |
| PPO | {ppo}, learning rate {config.ppo.learning_rate:g} |
| weights | {markdown_text(str(summary.weights))} |
| seed | {config.run.seed} |

On {len(summary.after_samples)} held-out prompts, with the same random numbers for both, which are
others than those of the evaluations that the weights were chosen by:

| | reference | this model | |
|---|---:|---:|---|
{table}

KL penalty in the last step: {summary.kl:.2f} nats per response.

![loss and mean reward](training.png)

## Samples

| prompt | response | score |
|---|---|---|
{examples}

"""
        + USAGE.format(path=json_text(summary.run))
    )
