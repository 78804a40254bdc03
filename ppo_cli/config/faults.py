"""Validates settings, and says of each fault where it is, which key, and what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ppo_cli.config.reward import ALTERNATIVES
from ppo_cli.config.secrets import HIDDEN, is_secret
from ppo_cli.errors import ConfigError, did_you_mean
from ppo_cli.utils.text import shortened
from ppo_cli.utils.yaml_io import Places

Settings = TypeVar("Settings", bound=BaseModel)
# Names of transformers' TrainingArguments -> what they are here.
SYNONYMS = {
    "report_to": "ppo.log_with (option --track)",
    "logging_dir": "ppo.project_kwargs.logging_dir",
}


@dataclasses.dataclass
class Origin:
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


def validated(kind: type[Settings], data: Mapping[str, Any], origin: Origin) -> Settings:
    """Settings of a kind from nested dictionaries.

    Raises:
        ConfigError: a line for each fault.
    """
    try:
        # From JSON, strict validation accepts a mapping for a dataclass, but not "1" for 1.
        text = json.dumps(data, default=str, ensure_ascii=False).encode()
        return kind.model_validate_json(text, strict=True)
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise ConfigError(f"{origin.file}: {found!r} holds bytes that are not UTF-8") from None
    except ValidationError as error:
        raise ConfigError(_describe(kind, error, origin)) from None


def _describe(root: type[BaseModel], error: ValidationError, origin: Origin) -> str:
    """A line for each fault: where it is, which key, what is wrong."""
    lines = []
    for item in error.errors():
        keys = tuple(str(part) for part in item["loc"] if part not in ALTERNATIVES)
        name = ".".join(keys)
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _known_keys(root, keys[:-1])
            near = did_you_mean(keys[-1], known)
            if keys[-1] in SYNONYMS:
                near = f" It is {SYNONYMS[keys[-1]]} here"
            problem = f"there is no such key.{near}"
            if not near:
                problem += f" Known here: {', '.join(known)}"
        elif item["type"] != "value_error":
            problem = f"{problem[:1].lower()}{problem[1:]}, got {_shown(item['input'], keys)}"
        place = origin.of_rule(keys, problem) if item["type"] == "value_error" else origin.of(keys)
        named = name and not place.startswith((f"--set {name}=", f"--set {name}."))
        lines.append(f"{place}: {name}: {problem}" if named else f"{place}: {problem}")
    return "\n".join(lines)


def _known_keys(root: type[BaseModel], keys: Iterable[str]) -> list[str]:
    """The keys that there are in the section at `keys`."""
    kind: Any = root
    remaining = iter(keys)
    for key in remaining:
        if key.isdigit():  # of a list
            continue
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        field = kind.model_fields.get(key)
        kind = _section_in(field.annotation) if field else None
        if field and get_origin(field.annotation) is dict:
            next(remaining, None)  # a name that the user chose
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _section_in(annotation: Any) -> Any:
    """The section in `Section | None` or a list of sections; else the annotation itself."""
    for inner in get_args(annotation):
        found = _section_in(inner)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation


def _shown(value: Any, keys: tuple[str, ...]) -> str:
    """A value as YAML writes it, shortened, and hidden where it may be a secret."""
    if is_secret(value, keys):
        return HIDDEN
    return shortened(
        json.dumps(value) if value is None or isinstance(value, bool) else repr(value), 60
    )
