"""Reads the file of a sweep, and tries its ranges on the configuration that they are for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_cli.config.faults import Origin, validated
from ppo_cli.config.loading import as_assignments, load_config, named_file, shipped_configs
from ppo_cli.config.schema import RunConfig
from ppo_cli.config.sweep import SweepConfig
from ppo_cli.errors import ConfigError
from ppo_cli.utils.yaml_io import Places, read_yaml

SWEEPS = "sweeps"  # folder of the sweeps that ship


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """A sweep that can be run.

    Attributes:
        sweep: what varies and how.
        name: of its file, for messages.
        config: the base configuration as `train --config` takes it.
        assignments: `section.key=value` that all trials share.
        base: the configuration with these.
        whole: the parameters that are whole numbers.
        places: assignment's key -> where it is written, for messages.
    """

    sweep: SweepConfig
    name: str
    config: str
    assignments: Sequence[str]
    base: RunConfig
    whole: frozenset[str]
    places: Mapping[str, str]

    @property
    def output(self) -> Path:
        """The directory of the sweep."""
        return Path(self.sweep.output or f"sweep-{Path(self.name).stem}")

    @property
    def seeds(self) -> list[int]:
        """The seed of each run of a trial."""
        seeds = self.sweep.seeds
        first = self.base.run.seed
        return list(seeds) if isinstance(seeds, list) else list(range(first, first + seeds))

    def trial_assignments(self, values: Mapping[str, Any]) -> list[str]:
        """The assignments of a trial: those that all share, and its own values."""
        return [*self.assignments, *as_assignments(values)]

    def trial_config(self, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of a trial, read anew, as its runs will.

        Raises:
            ConfigError: the values do not go together.
        """
        return _load(self.config, self.trial_assignments(values), self.places)


def load_sweep(
    name: str,
    *,
    assignments: Sequence[str] = (),
    trials: int | None = None,
    output: str | None = None,
) -> SweepSettings:
    """Read a sweep and check it.

    Args:
        name: a shipped sweep's name, or a YAML file.
        assignments: `section.key=value` each, of `--set`; they win over the file's own.
        trials, output: in place of the file's.

    Raises:
        ConfigError: the file does not parse, a key or value is wrong, or an end of a range is not
            possible in the configuration; the message says where.
    """
    path = sweep_file(name)
    origin = Origin(str(path))
    data = read_yaml(path, origin.places)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: keys of a sweep are needed ({', '.join(SweepConfig.model_fields)}), not a "
            f"{type(data).__name__}"
        )
    for key, value in (("trials", trials), ("output", output)):
        if value is not None:
            data[key] = value
            origin.set((key,), f"option --{key}")
    _lift(origin.places)
    sweep = validated(SweepConfig, data, origin)
    places = {
        key: origin.of((section, key))
        for section in ("set", "parameters")
        for key in getattr(sweep, section)
    }
    for text in assignments:
        key = text.partition("=")[0].strip()
        if key in sweep.parameters or key in ("run.output", "run.seed"):
            raise ConfigError(f"--set {key}: the sweep itself sets this key: leave it out")
    config = _beside(sweep.config, path)
    shared = [*as_assignments(sweep.set), *assignments]
    base = _load(config, shared, places)
    settings = SweepSettings(sweep, str(path), config, shared, base, frozenset(), places)
    _check_evaluations(settings)
    return dataclasses.replace(settings, whole=_try_ranges(settings))


def sweep_file(name: str) -> Path:
    """The file of a sweep: the name of a shipped one, or a path.

    Raises:
        ConfigError: there is no such file.
    """
    absent = "no such file of a sweep; 'ppo-cli sweep' lists some"
    return named_file(name, shipped_configs(SWEEPS), "sweep", absent)


def value_at(config: RunConfig, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _lift(places: Places) -> None:
    """Nothing but `choices` is below a key whose values are a list."""
    for keys in [keys for keys in places if keys[0] == "parameters" and keys[2:3] == ("0",)]:
        places[(*keys[:2], "choices")] = places[keys]


def _beside(config: str, file: Path) -> str:
    """The base configuration: a shipped one, or a file beside the sweep's."""
    if config in shipped_configs() or os.path.isabs(config):
        return config
    beside = file.parent / config
    return str(beside) if os.path.exists(beside) else config


def _load(config: str, assignments: Sequence[str], places: Mapping[str, str]) -> RunConfig:
    """`load_config`; of an assignment that the sweep's file holds, messages name its place."""
    try:
        return load_config(config, assignments=assignments)
    except ConfigError as error:
        text = str(error)
        for key, place in places.items():
            text = text.replace(f"--set {key}=", f"{place}: {key}=")
        raise ConfigError(text) from None


def _check_evaluations(settings: SweepSettings) -> None:
    run, sweep = settings.base.run, settings.sweep
    varies = {"run.eval_every", "run.steps"} & sweep.parameters.keys()
    if sweep.pruner != "none" and not varies and not 0 < run.eval_every < run.steps:
        raise ConfigError(
            f"{settings.name}: pruner {sweep.pruner} compares evaluations during a run, and "
            f"run.eval_every is {run.eval_every} of {run.steps} steps (run.steps): set it lower "
            "(0 is never), or pruner: none"
        )


def _try_ranges(settings: SweepSettings) -> frozenset[str]:
    """The parameters that are whole numbers; raise `ConfigError` where an end is impossible.

    An end that a rule between keys excludes is tried with the others at their ends, too.
    """
    parameters = settings.sweep.parameters
    whole = set()
    for key, parameter in parameters.items():
        others = [
            {},
            *(
                {k: p.ends[end] for k, p in parameters.items() if k != key}
                for end in (0, -1)
            ),
        ]  # fmt: skip
        found = [
            value_at(_first_possible(settings, [rest | {key: end} for rest in others]), key)
            for end in parameter.ends
        ]
        if parameter.choices is None and all(type(value) is int for value in found):
            whole.add(key)
            if parameter.step is not None and type(parameter.step) is not int:
                raise ConfigError(
                    f"{settings.places[key]}: {key}: step is {parameter.step}, and this key takes "
                    "whole numbers: give a whole step"
                )
    return frozenset(whole)


def _first_possible(settings: SweepSettings, candidates: Sequence[dict[str, Any]]) -> RunConfig:
    fault = None
    for values in candidates:
        try:
            return settings.trial_config(values)
        except ConfigError as error:
            fault = fault or error
    assert fault is not None
    raise fault
