"""Where a configuration comes from: shipped and own YAML files, `--set section.key=value`, options.

Every key remembers where it was written, so that an error can say so.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ppo_cli.config import AdapterConfig, RunConfig
from ppo_cli.errors import ConfigError, did_you_mean

DEFAULT_CONFIG = "tiny"


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
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise ConfigError(f"{name}: no such configuration file")
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
            data.setdefault(section, {})[key] = value
            origin.places[section, key] = f"option --{key.replace('_', '-')}"
    return validate(data, origin)


def validate(data: Mapping[str, Any], origin: _Origin | None = None) -> RunConfig:
    """A `RunConfig` from nested dictionaries.

    Raises:
        ConfigError: naming the key, its place in the file, and what it should be.
    """
    try:
        # By way of JSON: there strictness takes a mapping for a dataclass, yet no "1" for 1.
        return RunConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_describe(error, origin or _Origin("configuration"))) from None


@dataclasses.dataclass
class _Origin:
    """Where each key of a configuration was written."""

    file: str
    places: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)

    def of(self, keys: tuple[str, ...]) -> str:
        while keys:
            if keys in self.places:
                return self.places[keys]
            keys = keys[:-1]
        return self.file


class _Loader(yaml.SafeLoader):
    """The safe loader, with floats as YAML 1.2 has them: `1e-5` is a number."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:float"]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
# Integers are matched first: the float pattern would take them as well.
for _first, _pairs in _Loader.yaml_implicit_resolvers.items():
    _pairs.sort(key=lambda pair: pair[0] == "tag:yaml.org,2002:float")


def _parse(path: Path, origin: _Origin) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        _note_places(node, (), origin)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {error.problem or error.context}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: sections with keys are needed ({', '.join(RunConfig.model_fields)}), "
            f"not a {type(data).__name__}"
        )
    return {key: {} if value is None else value for key, value in data.items()}


def _note_places(node: yaml.Node, keys: tuple[str, ...], origin: _Origin) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        place = (*keys, str(key_node.value))
        where = f"{origin.file}, line {key_node.start_mark.line + 1}"
        if place in origin.places:
            raise ConfigError(f"{where}: '{'.'.join(place)}' is given twice")
        origin.places[place] = where
        _note_places(value_node, place, origin)


def _assign(data: dict[str, Any], text: str, origin: _Origin) -> None:
    name, equals, value_text = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(
            f"--set {text}: section.key=value is needed, such as ppo.learning_rate=3e-4"
        )
    try:
        value = yaml.load(value_text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {text}: the value is not YAML") from error
    target = data
    for key in keys[:-1]:
        inner = target.get(key)
        if not isinstance(inner, dict):
            inner = target[key] = {}
        target = inner
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
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
