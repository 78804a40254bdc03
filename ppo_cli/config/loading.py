"""Reads a configuration: a YAML file, then `--set section.key=value`, then the options.

The place where each key was written is kept for error messages.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

import ppo_cli
from ppo_cli.config.reward import OF_ONE_CLASSIFIER, RewardTerm
from ppo_cli.config.reward_options import parse_option, with_option
from ppo_cli.config.schema import AdapterConfig, RunConfig
from ppo_cli.config.secrets import HIDDEN, find_secret, is_secret, shown_assignment
from ppo_cli.errors import ConfigError, did_you_mean
from ppo_cli.utils.files import refuse_stream
from ppo_cli.utils.text import shortened
from ppo_cli.utils.yaml_io import Places, load_yaml, read_yaml

DEFAULT_CONFIG = "tiny"


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every configuration that ships with the program."""
    here = Path(ppo_cli.__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def config_file(name: str) -> Path:
    """The file of a configuration, given by the name of a shipped one or by its path.

    Raises:
        ConfigError: there is no such file.
    """
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or (name and os.path.exists(path)):
        refuse_stream(path)
        if not os.path.isfile(path):
            raise ConfigError(f"{name}: no such configuration file; 'ppo-cli config' lists others")
        return path
    raise ConfigError(
        f"no configuration is named '{name}'.{did_you_mean(name, shipped)} There are "
        f"{', '.join(shipped)}, or give a .yaml file"
    )


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
        name: a shipped configuration's name, or a YAML file.
        assignments: `section.key=value` each, the value as YAML; later ones win.
        overrides: (section, key) -> value, from the command's options; these win.
        rewards: values of `--reward`. They replace the reward; where `overrides` names a
            sentiment, they are added to it.

    Raises:
        ConfigError: the file does not parse, or a key or value is wrong; the message says where.
    """
    path = config_file(name)
    origin = _Origin(str(path))
    data = _parse(path, origin)
    _place_functions(data, path.parent)
    return _changed(data, origin, assignments, overrides or {}, rewards)


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
    origin = _Origin("configuration")
    return _changed(data, origin, assignments, overrides or {}, known_secret=known)


def _changed(
    data: dict[str, Any],
    origin: _Origin,
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
            origin.set((section, key), f"option --{key.replace('_', '-')}")
    config = _validated(data, origin)
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
    data: dict[str, Any], options: Sequence[str], origin: _Origin, *, add: bool
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
    return _validated(data, _Origin(file))


def _validated(data: Mapping[str, Any], origin: _Origin) -> RunConfig:
    try:
        # From JSON, strict validation accepts a mapping for a dataclass, but not "1" for 1.
        text = json.dumps(data, default=str, ensure_ascii=False).encode()
        return RunConfig.model_validate_json(text, strict=True)
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise ConfigError(f"{origin.file}: {found!r} holds bytes that are not UTF-8") from None
    except ValidationError as error:
        raise ConfigError(_describe(error, origin)) from None


@dataclasses.dataclass
class _Origin:
    """Where each key of a configuration was written."""

    file: str
    places: Places = dataclasses.field(default_factory=dict)

    def set(self, keys: tuple[str, ...], place: str) -> None:
        """Record where `keys` were written last."""
        self.places.pop(keys, None)  # so that `places` is in the order of writing
        self.places[keys] = place

    def of(self, keys: tuple[str, ...]) -> str:
        """The place of `keys`, or of the nearest section around them."""
        while keys:
            if keys in self.places:
                return self.places[keys]
            keys = keys[:-1]
        return self.file

    def of_rule(self, keys: tuple[str, ...], problem: str) -> str:
        """The place to change when a rule between keys is broken: that of the one set last."""
        mentioned = [(*keys, word) for word in re.findall(r"\w+", problem)]
        placed = [place for place in self.places if place in mentioned]
        return self.of(placed[-1] if placed else keys)


def _parse(path: Path, origin: _Origin) -> dict[str, Any]:
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


def _assign(data: dict[str, Any], text: str, origin: _Origin) -> None:
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


def _describe(error: ValidationError, origin: _Origin) -> str:
    """A line for each fault: where it is, which key, what is wrong."""
    lines = []
    for item in error.errors():
        # Tags of a union's alternatives stand in brackets.
        keys = tuple(str(part) for part in item["loc"] if not str(part).startswith("("))
        name = ".".join(keys)
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _known_keys(keys[:-1])
            problem = f"there is no such key.{did_you_mean(keys[-1], known)}"
            if not did_you_mean(keys[-1], known):
                problem += f" Known here: {', '.join(known)}"
        elif item["type"] != "value_error":
            problem = f"{problem[:1].lower()}{problem[1:]}, got {_shown(item['input'], keys)}"
        place = origin.of_rule(keys, problem) if item["type"] == "value_error" else origin.of(keys)
        named = name and not place.startswith((f"--set {name}=", f"--set {name}."))
        lines.append(f"{place}: {name}: {problem}" if named else f"{place}: {problem}")
    return "\n".join(lines)


def _known_keys(keys: Iterable[str]) -> list[str]:
    """The keys that there are in the section at `keys`."""
    kind: Any = RunConfig
    for key in keys:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        field = kind.model_fields.get(key)
        kind = field.annotation if field else None
        if kind == AdapterConfig | None:
            kind = AdapterConfig
        if key == "terms":
            return list(RewardTerm.model_fields)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _shown(value: Any, keys: tuple[str, ...]) -> str:
    """A value as YAML writes it, shortened, and hidden where it may be a secret."""
    if is_secret(value, keys):
        return HIDDEN
    return shortened(
        json.dumps(value) if value is None or isinstance(value, bool) else repr(value), 60
    )
