"""Where a configuration comes from: shipped and own YAML files, `--set section.key=value`, options.

Every key remembers where it was written, so that an error can say so.
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

from ppo_cli.config import AdapterConfig, RunConfig
from ppo_cli.errors import ConfigError, did_you_mean
from ppo_cli.files import refuse_stream
from ppo_cli.text import shortened
from ppo_cli.yaml_io import Places, load_yaml, read_yaml

DEFAULT_CONFIG = "tiny"
SECRET = re.compile(r"://[^/@\s]*:[^/@\s]+@|\bhf_[A-Za-z0-9]{20,}")
SECRET_KEY = re.compile(r"(^|_)(api_?key|token|secret|password|credentials?)$", re.IGNORECASE)


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every configuration that comes with the program."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def config_file(name: str) -> Path:
    """The file of a shipped configuration's name, or of a path.

    Raises:
        ConfigError: there is none.
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
) -> RunConfig:
    """Read a configuration and change it.

    Args:
        name: of a shipped configuration, or a YAML file.
        assignments: `section.key=value` each, the value as YAML; later ones win.
        overrides: (section, key) -> value, from the command line's own options; these win.

    Raises:
        ConfigError: it does not parse, or a key or value is wrong; the message says where.
    """
    path = config_file(name)
    origin = _Origin(str(path))
    return _changed(_parse(path, origin), origin, assignments, overrides or {})


def change_config(
    config: RunConfig,
    *,
    assignments: Sequence[str] = (),
    overrides: Mapping[tuple[str, str], Any] | None = None,
) -> RunConfig:
    """`config` with the changes that `load_config` would make to a file's.

    Raises:
        ConfigError: a key or value is wrong.
    """
    data = config.model_dump(mode="json")
    return _changed(data, _Origin("configuration"), assignments, overrides or {})


def _changed(
    data: dict[str, Any],
    origin: _Origin,
    assignments: Sequence[str],
    overrides: Mapping[tuple[str, str], Any],
) -> RunConfig:
    for text in assignments:
        _assign(data, text, origin)
    for (section, key), value in overrides.items():
        if value is not None:
            target = data.setdefault(section, {})
            if isinstance(target, dict):  # otherwise it is refused for that
                target[key] = value
            origin.places[section, key] = f"option --{key.replace('_', '-')}"
    return _validated(data, origin)


def validate(data: Mapping[str, Any], file: str = "configuration") -> RunConfig:
    """A `RunConfig` from nested dictionaries, read from `file`.

    Raises:
        ConfigError: naming the key and what it should be.
    """
    return _validated(data, _Origin(file))


def _validated(data: Mapping[str, Any], origin: _Origin) -> RunConfig:
    try:
        # By way of JSON: there strictness takes a mapping for a dataclass, yet no "1" for 1.
        text = json.dumps(data, default=str, ensure_ascii=False).encode()
        config = RunConfig.model_validate_json(text, strict=True)
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise ConfigError(f"{origin.file}: {found!r} holds bytes that are not UTF-8") from None
    except ValidationError as error:
        raise ConfigError(_describe(error, origin)) from None
    if keys := _secret_in(config.model_dump(mode="json")):
        place = origin.of(keys).partition("=")[0]  # of --set section.key=value not the value
        raise ConfigError(
            f"{place}: {'.'.join(keys)} looks like a password or token, which would be "
            "written into the run directory: give it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    return config


def _secret_in(values: Mapping[str, Any], keys: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The keys, outermost first, of the first value that looks like a secret."""
    for key, value in values.items():
        if isinstance(value, dict):
            if found := _secret_in(value, (*keys, key)):
                return found
        elif isinstance(value, str) and value and (SECRET.search(value) or SECRET_KEY.search(key)):
            return (*keys, key)
    return ()


@dataclasses.dataclass
class _Origin:
    """Where each key of a configuration was written."""

    file: str
    places: Places = dataclasses.field(default_factory=dict)

    def of(self, keys: tuple[str, ...]) -> str:
        while keys:
            if keys in self.places:
                return self.places[keys]
            keys = keys[:-1]
        return self.file


def _parse(path: Path, origin: _Origin) -> dict[str, Any]:
    data = read_yaml(path, origin.places)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: sections with keys are needed ({', '.join(RunConfig.model_fields)}), "
            f"not a {type(data).__name__}"
        )
    return {key: {} if value is None else value for key, value in data.items()}


def _assign(data: dict[str, Any], text: str, origin: _Origin) -> None:
    name, equals, value_text = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(
            f"--set {text}: section.key=value is needed, such as ppo.learning_rate=3e-4"
        )
    value = load_yaml(value_text, f"--set {text}", {})
    target = data
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {text}: '{key}' is a value, it has no keys: leave them out")
    target[keys[-1]] = value
    origin.places[keys] = f"--set {text}"
    for depth in range(1, len(keys)):
        origin.places.setdefault(keys[:depth], f"--set {text}")


def _describe(error: ValidationError, origin: _Origin) -> str:
    lines = []
    for item in error.errors():
        keys = tuple(str(part) for part in item["loc"])
        name = ".".join(keys)
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _known_keys(keys[:-1])
            problem = f"there is no such key.{did_you_mean(keys[-1], known)}"
            if not did_you_mean(keys[-1], known):
                problem += f" Known here: {', '.join(known)}"
        elif item["type"] != "value_error":
            problem = f"{problem[:1].lower()}{problem[1:]}, got {_shown(item['input'])}"
        place = origin.of(keys)
        named = name and not place.startswith(f"--set {name}=")
        lines.append(f"{place}: {name}: {problem}" if named else f"{place}: {problem}")
    return "\n".join(lines)


def _known_keys(keys: Iterable[str]) -> list[str]:
    kind: Any = RunConfig
    for key in keys:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        field = kind.model_fields.get(key)
        kind = field.annotation if field else None
        if kind == AdapterConfig | None:
            kind = AdapterConfig
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _shown(value: Any) -> str:
    """A value as YAML writes it, not too long."""
    return shortened(
        json.dumps(value) if value is None or isinstance(value, bool) else repr(value), 60
    )
