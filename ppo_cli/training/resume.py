"""Checks of a resumed run: settings, inputs, code and machine are those it was started with."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ppo_cli.config.loading import validate
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.fingerprint import Inputs
from ppo_cli.errors import UsageError
from ppo_cli.training.provenance import what_differs
from ppo_cli.training.run_directory import CONFIG_FILE, RunDirectory
from ppo_cli.utils.inventory import STATE_FILE

CHANGEABLE = (
    "policy.kernels",
    "policy.adapter.save",
    "run.steps",
    "run.device",
    "run.checkpoint_every",
    "run.keep",
    "run.eval_every",
    "run.weights",
    "run.target_score",
    "run.stop_kl",
    "run.patience",
    "run.on_divergence",
    "run.kl_limit",
    "run.collapse_limit",
    "run.best_of_n",
    "run.samples_per_step",
    "rollout.batch_size",
    "reward.batch_size",
    "reward.terms.batch_size",
    "reward.terms.timeout",
    "reward.terms.retries",
    "ppo.gradient_checkpointing",
    "ppo.optimize_device_cache",
    "ppo.log_with",
    "ppo.tracker_project_name",
    "ppo.tracker_kwargs",
    "ppo.project_kwargs",
)
# These may change if their product, the number of samples of an optimizer step, does not.
BACKWARD_BATCH = ("ppo.mini_batch_size", "ppo.gradient_accumulation_steps")
# Names of inputs may change if `run.yaml` records the inputs themselves.
INPUTS = (
    "policy.model",
    "policy.revision",
    "reward.model",
    "reward.revision",
    "reward.terms.model",
    "reward.terms.revision",
    "reward.terms.function",
    "prompts.source",
    "prompts.revision",
    "prompts.held_out_source",
)


def made_with(directory: RunDirectory) -> RunConfig:
    """The configuration of the newest checkpoint, which an edit of `run.yaml` does not change.

    Checkpoints of earlier releases hold none: then the configuration is that of `run.yaml`.
    """
    states = directory.checkpoints.glob(f"step-*/{STATE_FILE}")
    for state in sorted(states, reverse=True):
        if not state.is_file():
            continue
        try:
            return validate(json.loads(state.read_bytes())["settings"], str(state))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged, or of another release
    return directory.config()


def resumed_config(directory: RunDirectory, wanted: RunConfig) -> tuple[RunConfig, list[str]]:
    """Check the settings with which a run shall be resumed.

    Returns:
        `wanted`, and its differences from the run's own settings: `run.steps 4 -> 6`.

    Raises:
        UsageError: a setting differs that may not change within a run.
    """
    own = made_with(directory)
    changes = _differences(own.model_dump(mode="json"), wanted.model_dump(mode="json"))
    free = set(CHANGEABLE)
    if own.ppo.backward_batch_size == wanted.ppo.backward_batch_size:
        free.update(BACKWARD_BATCH)
    inputs = directory.recorded().get("inputs")
    recorded = {str(key).partition(".")[0] for key in inputs} if isinstance(inputs, dict) else ()
    free.update(key for key in INPUTS if key.partition(".")[0] in recorded)
    fixed = {key: change for key, change in changes.items() if not _is_under(_general(key), free)}
    if fixed:
        edits = _differences(
            own.model_dump(mode="json"), directory.config().model_dump(mode="json")
        )
        if edited := [change for key, change in fixed.items() if edits.get(key) == change]:
            raise UsageError(
                f"{directory.path / CONFIG_FILE} was edited after its newest checkpoint was made "
                f"({', '.join(edited)}): put back what it was, or train anew with --overwrite"
            )
        raise UsageError(
            f"{directory.path} was made with other settings ({', '.join(fixed.values())}): resume "
            "it with the options it was started with, or train anew with --overwrite. Free to "
            f"change: {', '.join(CHANGEABLE)}; {' and '.join(BACKWARD_BATCH)} with an equal "
            "product"
        )
    run = wanted.run.model_copy(update={"output": str(directory.path)})
    return wanted.model_copy(update={"run": run}), list(changes.values())


def learns_alike(a: RunConfig, b: RunConfig) -> bool:
    """Whether two configurations differ in nothing but the seed and what a resumed run may change.

    Of that, the number of steps counts if the learning rate depends on it.
    """
    free = {*CHANGEABLE, "run.seed"}
    if a.ppo.rate_depends_on_steps:
        free.remove("run.steps")
    changes = _differences(a.model_dump(mode="json"), b.model_dump(mode="json"))
    return all(_is_under(_general(key), free) for key in changes)


def locate_inputs(
    directory: RunDirectory, config: RunConfig, allow_changed: bool
) -> tuple[RunConfig, Inputs | None]:
    """Find the models and prompts of a run that is resumed; warn where they have changed.

    Returns:
        `config` with the places of the inputs as their names, and the inputs' records; no records
        for a run of an earlier release.

    Raises:
        UsageError: an input has changed, and `allow_changed` is not set.
    """
    recorded = Inputs(directory.recorded().get("inputs"))
    if not recorded.records:
        warnings.warn(
            f"{directory.path} has no record of its inputs, as runs of earlier releases: whether "
            "models and prompts are still the same is not checked",
            stacklevel=2,
        )
        return config, None
    located, changes, inputs = recorded.locate(config)
    if changes and not allow_changed:
        raise UsageError(
            f"{directory.path} was started with other inputs. {'; '.join(changes)}. Put "
            "back what it was, or give --allow-changed-inputs to go on with what is there now, "
            "as another run"
        )
    for change in changes:
        warnings.warn(f"going on with changed inputs: {change}", stacklevel=2)
    return located, inputs


def reproducibility_warnings(
    directory: RunDirectory, config: RunConfig, step: int, now: Mapping[str, Any]
) -> Iterator[str]:
    """Why a resumed run will not be the same as one that never paused.

    Args:
        directory: of the run.
        config: its settings from here on.
        step: number of steps done.
        now: today's code and machine, as `run.yaml` records them.
    """
    if differences := what_differs(directory.recorded(), now):
        yield (
            f"this run was made with {', '.join(differences)}: its numbers may go on with "
            "other digits than there"
        )
    steps, before = config.run.steps, made_with(directory).run.steps
    if steps != before and config.ppo.rate_depends_on_steps and step < steps:
        yield (
            "the learning rate's course depends on run.steps (ppo.lr_scheduler_type: "
            f"{config.ppo.lr_scheduler_type}): up to step {step} it was that of "
            f"{before} steps, from here on it is that of {steps}, so the result is not that of "
            f"one run of {steps} steps"
        )


def _is_under(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of `keys`, or lies in a mapping that is."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> `key old -> new` for each difference but that of `run.output`."""
    changes: dict[str, str] = {}
    for key in {**a, **b}:
        left, right, name = _by_number(a.get(key)), _by_number(b.get(key)), prefix + key
        if isinstance(left, dict) and isinstance(right, dict):
            changes |= _differences(left, right, name + ".")
        elif left != right and name != "run.output":
            changes[name] = f"{name} {json.dumps(left)} -> {json.dumps(right)}"
    return changes


def _by_number(value: Any) -> Any:
    """A list of sections as a section whose keys are their numbers."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def _general(key: str) -> str:
    """A key without the numbers of terms: `reward.terms.0.model` -> `reward.terms.model`."""
    return re.sub(r"\.\d+(?=\.)", "", key)
