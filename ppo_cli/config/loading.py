"""Reads a configuration: a YAML file, then `--set section.key=value`, then the options.

The file may be the `run.yaml` of a run, or its run directory. The place where each key was written
is kept for error messages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ppo_cli
from ppo_cli.config.faults import Origin, validated
from ppo_cli.config.reward import OF_ONE_CLASSIFIER
from ppo_cli.config.reward_options import parse_option, with_option
from ppo_cli.config.schema import RunConfig
from ppo_cli.config.secrets import find_secret, shown_assignment
from ppo_cli.errors import ConfigError, did_you_mean
from ppo_cli.utils.files import refuse_stream
from ppo_cli.utils.yaml_io import load_yaml, read_yaml

DEFAULT_CONFIG = "tiny"
# Keys that have another name on the command line.
OPTIONS = {("ppo", "log_with"): "--track", ("run", "kl_budget"): "--kl"}
RECORD_FILE = "run.yaml"  # of a run directory: the run's configuration under `config`, and facts
RECORDED = "config"


def shipped_configs(kind: str = "") -> dict[str, Path]:
    """Name -> file of every configuration that ships, or of those in its folder `kind`."""
    here = Path(ppo_cli.__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted((folder / kind).glob("*.yaml"))}
    return {}


def config_file(name: str) -> Path:
    """The file of a configuration: the name of a shipped one, a path, or a run directory.

    Raises:
        ConfigError: there is no such file.
    """
    shipped = shipped_configs()
    record = Path(name) / RECORD_FILE
    if name and name not in shipped and os.path.isfile(record):
        return record
    absent = "no such configuration file; 'ppo-cli config' lists others"
    return named_file(name, shipped, "configuration", absent)


def named_file(name: str, shipped: Mapping[str, Path], kind: str, absent: str) -> Path:
    """The file of a shipped name, or of a path.

    Args:
        name: what the user gave.
        shipped: name -> file.
        kind: what such a file is called.
        absent: what to say of a path where no file is.

    Raises:
        ConfigError: there is no such file.
    """
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or (name and os.path.exists(path)):
        refuse_stream(path)
        if not os.path.isfile(path):
            raise ConfigError(f"{name}: {absent}")
        return path
    raise ConfigError(
        f"no {kind} is named '{name}'.{did_you_mean(name, shipped)} There are "
        f"{', '.join(shipped)}, or give a .yaml file"
    )


def as_assignments(values: Mapping[str, Any]) -> list[str]:
    """`section.key=value`, as `--set` takes it, of each dotted key."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def load_config(
    name: str = DEFAULT_CONFIG,
    *,
    assignments: Sequence[str] = (),
    overrides: Mapping[tuple[str, str], Any] | None = None,
    rewards: Sequence[str] = (),
) -> RunConfig:
    """Read a configuration and change it.

    A reward function in a file is looked for beside the configuration that names it.

    Args:
        name: a shipped configuration's name, a YAML file, or a run directory. Of a run's
            `run.yaml` all settings are taken but its output, which is that of the old run.
        assignments: `section.key=value` each, the value as YAML; later ones win.
        overrides: (section, key) -> value, from the command's options; these win.
        rewards: values of `--reward`. They replace the reward; where `overrides` names a
            sentiment, they are added to it.

    Raises:
        ConfigError: the file does not parse, or a key or value is wrong; the message says where.
    """
    data, origin = _read(name)
    return _changed(data, origin, assignments, overrides or {}, rewards)


def read_config(name: str) -> dict[str, Any]:
    """The keys that a configuration sets, as `load_config` reads them, without their defaults.

    Raises:
        ConfigError: there is no such file, or it does not parse.
    """
    return _read(name)[0]


def _read(name: str) -> tuple[dict[str, Any], Origin]:
    """The settings in a configuration, and where they stand."""
    path = config_file(name)
    origin = Origin(str(path))
    data = _parse(path, origin)
    if _is_record(data):
        return _recorded_settings(data, origin), origin
    _place_functions(data, path.parent)
    return data, origin


def recorded_run(name: str) -> Path | None:
    """The run directory whose `run.yaml` is given as a configuration; None for any other file.

    Raises:
        ConfigError: there is no such file, or it is not YAML.
    """
    path = config_file(name)
    is_record = path.name == RECORD_FILE and _is_record(_parse(path, Origin(str(path))))
    return path.parent if is_record else None


def change_config(
    config: RunConfig,
    *,
    assignments: Sequence[str] = (),
    overrides: Mapping[tuple[str, str], Any] | None = None,
) -> RunConfig:
    """`config` with assignments and overrides, as in `load_config`.

    Raises:
        ConfigError: a key or value is wrong.
    """
    data = config.model_dump(mode="json")
    known = find_secret(data)
    origin = Origin("configuration")
    return _changed(data, origin, assignments, overrides or {}, known_secret=known)


def checked(
    data: dict[str, Any],
    file: str,
    assignments: Sequence[str] = (),
    places: Mapping[tuple[str, ...], str] | None = None,
) -> RunConfig:
    """The settings in nested dictionaries, which receive the assignments, too.

    Args:
        data: sections with keys; changed in place.
        file: where they come from, for messages.
        assignments: as in `load_config`.
        places: where single keys come from.

    Raises:
        ConfigError: a key or value is wrong.
    """
    return _changed(data, Origin(file, dict(places or {})), assignments, {})


def _changed(
    data: dict[str, Any],
    origin: Origin,
    assignments: Sequence[str],
    overrides: Mapping[tuple[str, str], Any],
    rewards: Sequence[str] = (),
    known_secret: tuple[str, ...] = (),
) -> RunConfig:
    """Apply the changes and validate; refuse a secret, unless its keys are `known_secret`."""
    for text in assignments:
        _assign(data, text, origin)
    sentiment = overrides.get(("reward", "sentiment"))
    if rewards:
        _add_rewards(data, rewards, origin, add=sentiment is not None)
    for (section, key), value in overrides.items():
        if value is not None:
            target = data.setdefault(section, {})
            if isinstance(target, dict):  # validation refuses anything else
                target[key] = value
            option = OPTIONS.get((section, key)) or f"--{key.replace('_', '-')}"
            origin.set((section, key), f"option {option}")
    config = validated(RunConfig, data, origin)
    if sentiment is not None and not config.reward.takes_sentiment:
        raise ConfigError(
            "--sentiment has no effect: no term of the reward is a classifier without a sentiment "
            "of its own; leave it out"
        )
    keys = find_secret(config.model_dump(mode="json"))
    if keys not in ((), known_secret):
        place = origin.of(keys).partition("=")[0]  # of --set section.key=value not the value
        raise ConfigError(
            f"{place}: {'.'.join(keys)} looks like a password or token, which would be "
            "written into the run directory: give it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    return config


def _add_rewards(
    data: dict[str, Any], options: Sequence[str], origin: Origin, *, add: bool
) -> None:
    """Make the values of `--reward` the terms of the reward, or add them to those it has."""
    terms = []
    for text in options:
        try:
            terms.append(parse_option(text))
        except ValueError as error:
            raise ConfigError(f"--reward {text}: {error}") from None
    section = data.setdefault("reward", {})
    if not isinstance(section, dict):
        return  # validation refuses it
    for key in (*OF_ONE_CLASSIFIER, "terms"):
        place = origin.places.get(("reward", key), "")
        if place.startswith("--set") and not add:
            raise ConfigError(
                f"{place}: --reward replaces the classifier: leave one of them out, or add "
                "--sentiment LABEL to have both"
            )
    if "score_every" in section and origin.of(("reward", "score_every")).startswith("--set"):
        kept = section["score_every"]
        with_option(section, terms, add=add)
        section["score_every"] = kept
    else:
        with_option(section, terms, add=add)
    first = len(section["terms"]) - len(terms) if isinstance(section["terms"], list) else 0
    for number, text in enumerate(options, start=first):
        origin.set(("reward", "terms", str(number)), f"--reward {text}")


def _place_functions(data: dict[str, Any], folder: Path) -> None:
    """Make the files of reward functions, which are relative to `folder`, relative to here."""
    section = data.get("reward")
    terms = section.get("terms") if isinstance(section, dict) else None
    for term in terms if isinstance(terms, list) else ():
        spec = term.get("function") if isinstance(term, dict) else None
        if isinstance(spec, str) and spec.rpartition(":")[0].endswith(".py"):
            term["function"] = str(folder / os.path.expanduser(spec))


def validate(data: Mapping[str, Any], file: str = "configuration") -> RunConfig:
    """A `RunConfig` from nested dictionaries, read from `file`.

    Raises:
        ConfigError: naming the key and what it should be.
    """
    return validated(RunConfig, data, Origin(file))


def _parse(path: Path, origin: Origin) -> dict[str, Any]:
    """The sections of a YAML file; the places of its keys go into `origin`."""
    data = read_yaml(path, origin.places)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: sections with keys are needed ({', '.join(RunConfig.model_fields)}), "
            f"not a {type(data).__name__}"
        )
    if isinstance(data.get("reward"), list):  # short for a section with these terms
        data["reward"] = {"terms": data["reward"]}
        for keys in [keys for keys in origin.places if keys[0] == "reward" and keys[1:]]:
            origin.places[("reward", "terms", *keys[1:])] = origin.places.pop(keys)
    return {key: {} if value is None else value for key, value in data.items()}


def _is_record(data: Mapping[str, Any]) -> bool:
    """Whether a file is the `run.yaml` of a run: its settings stand below one key."""
    settings = data.get(RECORDED)
    return isinstance(settings, dict) and bool(settings.keys() & RunConfig.model_fields.keys())


def _recorded_settings(data: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    """The settings in a `run.yaml`, without the old run's output; their places into `origin`."""
    for keys, place in [*origin.places.items()]:
        if keys[0] == RECORDED:
            origin.places[keys[1:]] = place
        del origin.places[keys]
    settings: dict[str, Any] = data[RECORDED]
    if isinstance(run := settings.get("run"), dict):  # validation refuses anything else
        run["output"] = None
    inputs = data.get("inputs")
    for keys, record in inputs.items() if isinstance(inputs, dict) else ():
        section, _, key = str(keys).partition(".")
        target = settings.get(section)
        if isinstance(target, dict) and isinstance(record, dict):
            target[key] = _place_of(record, target.get(key))
    return settings


def _place_of(record: Mapping[str, Any], name: Any) -> Any:
    """The absolute path that was recorded of an input, if its relative name leads nowhere here."""
    path = record.get("path")
    is_elsewhere = isinstance(path, str) and os.path.exists(path) and record.get("name") == name
    return path if is_elsewhere and not os.path.exists(str(name)) else name


def _assign(data: dict[str, Any], text: str, origin: Origin) -> None:
    """Apply one `section.key=value` to `data`."""
    name, equals, value_text = text.partition("=")
    keys = tuple(name.strip().split("."))
    place = shown_assignment(name, value_text) if equals else f"--set {text}"
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"{place}: section.key=value is needed, such as ppo.learning_rate=3e-4")
    value = load_yaml(value_text, place, {})
    target = data
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(f"{place}: '{key}' is a value, it has no keys: leave them out")
    target[keys[-1]] = value
    origin.set(keys, place)
    for depth in range(1, len(keys)):
        origin.places.setdefault(keys[:depth], place)
