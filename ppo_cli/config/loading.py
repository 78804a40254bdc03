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

import ppo_cli
from ppo_cli.config.schema import AdapterConfig, RunConfig
from ppo_cli.errors import SECRET, ConfigError, did_you_mean
from ppo_cli.utils.files import refuse_stream
from ppo_cli.utils.text import shortened
from ppo_cli.utils.yaml_io import Places, load_yaml, read_yaml

DEFAULT_CONFIG = "tiny"
# How the names of secrets end, in lower case with underscores: `token`, but not `pad_token`.
SECRET_KEY = re.compile(
    r"(^|_)(pass(word|wd|phrase|code)s?|pwd|secrets?|credentials?|bearer|o?auth|authorization|cookies?"
    r"|api_?keys?|(access|secret|private|account|encryption|signing|ssh)_?keys?(_id)?"
    r"|(access|api|auth|secret)_?tokens"
    # tokens of a tokenizer are none
    r"|(?<!(?:pad|eos|bos|unk|sep|cls|end|per|new)_)(?<!(?:mask|stop|last|next)_)"
    r"(?<!(?:image|audio|video|start|begin|first)_)(?<!special_)token)(_?\d+)?$"
)
UNSAID = "***"
KEY_OF = re.compile(r"[\w-]+(?=[\"']?\s*[:=])")  # in text that is not parsed
HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # as wandb's; a commit's hash looks the same


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every configuration that comes with the program."""
    here = Path(ppo_cli.__file__).parent
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
    known = _secret_in(data)
    return _changed(data, _Origin("configuration"), assignments, overrides or {}, known)


def _changed(
    data: dict[str, Any],
    origin: _Origin,
    assignments: Sequence[str],
    overrides: Mapping[tuple[str, str], Any],
    known_secret: tuple[str, ...] = (),
) -> RunConfig:
    for text in assignments:
        _assign(data, text, origin)
    for (section, key), value in overrides.items():
        if value is not None:
            target = data.setdefault(section, {})
            if isinstance(target, dict):  # otherwise it is refused for that
                target[key] = value
            origin.set((section, key), f"option --{key.replace('_', '-')}")
    config = _validated(data, origin)
    keys = _secret_in(config.model_dump(mode="json"))
    if keys not in ((), known_secret):
        place = origin.of(keys).partition("=")[0]  # of --set section.key=value not the value
        raise ConfigError(
            f"{place}: {'.'.join(keys)} looks like a password or token, which would be "
            "written into the run directory: give it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    return config


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
        return RunConfig.model_validate_json(text, strict=True)
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise ConfigError(f"{origin.file}: {found!r} holds bytes that are not UTF-8") from None
    except ValidationError as error:
        raise ConfigError(_describe(error, origin)) from None


def _secret_in(value: Any, keys: tuple[str, ...] = (), named: bool = False) -> tuple[str, ...]:
    """The keys, outermost first, of the first value in `value` that looks like a secret.

    Args:
        value: nested dictionaries and lists.
        keys: where `value` stands.
        named: whether a key further out is a secret's, so that whatever stands here is one.
    """
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inner = (*keys, str(key))
            if SECRET.search(str(key)):
                return inner
            if found := _secret_in(item, inner, named or _is_secret_name(str(key))):
                return found
        return ()
    if value in (None, "") or isinstance(value, bool):
        return ()
    hexadecimal = HEX_KEY.search(str(value)) and "key" in "".join(keys).lower()
    return keys if named or hexadecimal or SECRET.search(str(value)) else ()


def _is_secret_name(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name)  # apiKey, api-key: api_key
    return SECRET_KEY.search(words.lower()) is not None


def _set_option(name: str, value: str) -> str:
    """`--set name=value` for a message, without the value where it may be a secret."""
    text = f"{name}={value}"
    secret = _secret_in(value, (name,)) or any(map(_is_secret_name, KEY_OF.findall(text)))
    return f"--set {name}={UNSAID if secret else value}"


@dataclasses.dataclass
class _Origin:
    """Where each key of a configuration was written."""

    file: str
    places: Places = dataclasses.field(default_factory=dict)

    def set(self, keys: tuple[str, ...], place: str) -> None:
        """Note where `keys` were written last."""
        self.places.pop(keys, None)  # so that `places` is in the order of time
        self.places[keys] = place

    def of(self, keys: tuple[str, ...]) -> str:
        while keys:
            if keys in self.places:
                return self.places[keys]
            keys = keys[:-1]
        return self.file

    def of_rule(self, keys: tuple[str, ...], problem: str) -> str:
        """Where to change what breaks a rule between keys: the one of them that was set last."""
        mentioned = [(*keys, word) for word in re.findall(r"\w+", problem)]
        placed = [place for place in self.places if place in mentioned]
        return self.of(placed[-1] if placed else keys)


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
    place = _set_option(name, value_text) if equals else f"--set {text}"
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
            problem = f"{problem[:1].lower()}{problem[1:]}, got {_shown(item['input'], keys)}"
        place = origin.of_rule(keys, problem) if item["type"] == "value_error" else origin.of(keys)
        named = name and not place.startswith((f"--set {name}=", f"--set {name}."))
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


def _shown(value: Any, keys: tuple[str, ...]) -> str:
    """A value as YAML writes it, not too long, and without what may be a secret."""
    if _secret_in(value, keys, any(map(_is_secret_name, keys))):
        return UNSAID
    return shortened(
        json.dumps(value) if value is None or isinstance(value, bool) else repr(value), 60
    )
