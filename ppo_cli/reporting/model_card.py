"""The model card of a run: its origin, settings and results, and how to load the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_cli.data.fingerprint import prompt_inputs
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.evaluation import quality
from ppo_cli.models.model_card import CAUSAL, make_card, usage
from ppo_cli.utils.hub import license_of
from ppo_cli.utils.local_names import hub_id, public_name
from ppo_cli.utils.text import markdown_code, markdown_text

EMBEDDED_LICENSE = "apache-2.0"  # of this program, whose models they are
EMBEDDED_NOTE = """
The {parts} marked `embedded` {are} this program's own: small, made from reviews that a grammar
writes, for trying things out. No text of anybody else's is in them, and they know nothing else.
"""
BY_CLASSIFIER = ("score", "probability", "on_target")  # measures that depend on it
Records = Mapping[str, Mapping[str, Any]]


def run_card(summary: Any, config: Any, inputs: Records | None = None, task: str = CAUSAL) -> str:
    """Make the card of a run directory.

    Local models and files are called by their names, without the folders that lead to them.

    Args:
        summary: a `TrainingSummary`.
        config: the run's `RunConfig`.
        inputs: records of the run's inputs by key, as `run.yaml` has them.
        task: what the model does, as for `make_card`.
    """
    inputs = inputs or {}
    made = f"{summary.steps} of {summary.planned_steps} steps"
    unfinished = (
        "" if summary.steps == summary.planned_steps else f" The run was stopped after {made}."
    )
    if summary.stopped_early:
        unfinished = f" The run ended early, after {made}: {markdown_text(summary.stopped_early)}."
    before = summary.before.rows(summary.label, markdown_text)
    table = "\n".join(
        f"| {name} | {before[name][0]:{form}} | {value:{form}} | {meaning} |"
        for name, (value, form, meaning) in summary.after.rows(summary.label, markdown_text).items()
    )
    examples = "\n".join(
        f"| {markdown_text(sample.query)} | {markdown_text(sample.response)} | {sample.score:.2f} |"
        for sample in summary.after_samples[:5]
    )
    ppo = f"{summary.steps} steps of {config.ppo.batch_size}"
    name = Path(summary.run).absolute().name
    policy, classifiers, prompts = _names(config, inputs)
    body = f"""# {markdown_text(name)}

A language model tuned with Proximal Policy Optimization towards {_goal(summary, config)} \
by ppo-cli.{unfinished}

| | |
|---|---|
| policy | {markdown_code(policy)} |
{_reward_rows(summary, config, inputs)}
| prompts | {markdown_code(prompts)} |
| PPO | {ppo}, learning rate {config.ppo.learning_rate:g} |
| weights | {markdown_text(str(summary.weights))} |
| seed | {config.run.seed} |
{_embedded_note(policy, classifiers, prompts)}
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

{usage(name, task)}"""
    return make_card(body, task, model_name=name, **_metadata(summary, config, inputs))


def _names(config: Any, inputs: Records) -> tuple[str, str, str]:
    """Policy, classifiers and prompts as the card calls them."""
    by_name = {record.get("name"): record for record in inputs.values()}
    return (
        public_name(config.policy.model, inputs.get("policy.model")),
        ", ".join(public_name(model, by_name.get(model)) for model in config.reward.models),
        ", ".join(
            public_name(name, inputs.get(key))
            for key, (name, _) in prompt_inputs(config.prompts).items()
            if key.endswith(".source")
        ),
    )


def _embedded_note(*names: str) -> str:
    kinds = ("policy", "classifier", "prompts")
    parts = [kind for kind, name in zip(kinds, names, strict=True) if name == EMBEDDED]
    if not parts:
        return ""
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    are = "is" if parts in (["policy"], ["classifier"]) else "are"
    return EMBEDDED_NOTE.format(parts=listed, are=are)


def _metadata(summary: Any, config: Any, inputs: Records) -> dict[str, Any]:
    """What is known for certain: ids on the hub, the license of the base, the evaluation."""
    policy = inputs.get("policy.model") or {}
    base_record = policy.get("base") or {}
    base = hub_id(config.policy.model, policy) or hub_id(base_record.get("name", ""), base_record)
    sources = prompt_inputs(config.prompts)
    datasets = [hub_id(name, inputs.get(key)) for key, (name, _) in sources.items()]
    known = list(dict.fromkeys(filter(None, datasets)))
    dataset = known[0] if len(known) == len(datasets) == 1 else None
    is_embedded = config.policy.model == EMBEDDED
    folder = base_record.get("path") or policy.get("path")
    return {
        "base_model": base,
        "datasets": known or None,
        "license": EMBEDDED_LICENSE if is_embedded else license_of(base, folder),
        "eval_results": _results(summary, config, inputs, dataset),
    }


def _results(summary: Any, config: Any, inputs: Records, dataset: str | None) -> list[Any]:
    """The evaluation of the weights in the directory, for the card's `model-index`."""
    from huggingface_hub import EvalResult

    _, classifiers, prompts = _names(config, inputs)
    by_classifier = {"classifier": classifiers, "label": summary.label} if classifiers else None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_name=f"{prompts}, {len(summary.after_samples)} held-out prompts",
            dataset_type=dataset or "custom",
            dataset_config=config.prompts.subset if dataset else None,
            dataset_split=config.prompts.split if dataset else None,
            metric_type=m.key,
            metric_name=m.name.format(label=summary.label),
            metric_value=round(summary.after[m.key], 4),
            metric_args=by_classifier if m.key in BY_CLASSIFIER else None,
        )
        for m in quality.MEASURES
        if math.isfinite(summary.after.values.get(m.key, math.nan))
    ]


def _goal(summary: Any, config: Any) -> str:
    if config.reward.terms is None:
        return f"the sentiment\n{markdown_code(summary.label)}"
    return f"a reward of\n{' + '.join(map(markdown_code, config.reward.names))}"


def _reward_rows(summary: Any, config: Any, inputs: Records) -> str:
    """The classifier, or a row for each term of the reward."""
    reward = config.reward
    if reward.terms is None:
        classifier = public_name(reward.model, inputs.get("reward.model"))
        label = markdown_code(summary.label)
        return f"| classifier | {markdown_code(classifier)}, label {label}, {reward.output} |"
    rows = []
    for i, (name, term) in enumerate(zip(reward.names, reward.terms, strict=True)):
        weight = term.weight
        shown = f"{weight:g}" if isinstance(weight, float) else weight.describe()
        what, value = term.kind
        record = inputs.get(f"reward.terms.{i}.{what}")
        rows.append(
            f"| reward {markdown_text(name)} | {what} {markdown_code(public_name(value, record))}, "
            f"weight {shown} |"
        )
    return "\n".join(rows)
