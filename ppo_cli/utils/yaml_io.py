"""Reads and writes YAML: plain values only, in the size of a configuration."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ppo_cli.errors import ConfigError
from ppo_cli.utils.files import refuse_stream
from ppo_cli.utils.text import escape_controls, shortened

MAX_BYTES = 1024 * 1024
MAX_VALUES = 10_000

Places = dict[tuple[str, ...], str]
"""Keys, outermost first -> file and line."""


class _Loader(yaml.SafeLoader):
    """The safe loader with the floats of YAML 1.2: `1e-5` is a number."""


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
# Integers are matched first, because the float pattern matches them as well.
for _first, _pairs in _Loader.yaml_implicit_resolvers.items():
    _pairs.sort(key=lambda pair: pair[0] == "tag:yaml.org,2002:float")


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """`_Loader` with the parser in C, ten times as fast, where PyYAML has it."""


_FastLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(path: Path, places: Places | None = None) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        places: receives the line of each key, for messages.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is too large.
    """
    refuse_stream(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_BYTES // 1024} KiB, which no configuration is: give "
            "another file"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; save the file in that encoding"
        ) from error
    return load_yaml(text, str(path), {} if places is None else places)


def load_yaml(text: str, name: str, places: Places) -> Any:
    """Parse a YAML text that comes from `name`; `places` receives the line of each key.

    Raises:
        ConfigError: the text is not YAML, a key is not a name or is given twice, or anchors expand
            to too many values.
    """
    try:
        loader, node = _composed(text)
        if node is None:
            return None
        _Walk(name, places).visit(node, ())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply for a configuration") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error


def _composed(text: str) -> tuple[Any, yaml.Node | None]:
    """A loader of the text, and its document."""
    # The parser in C has no limit to the depth, which these characters make within a line.
    if sum(map(text.count, "[{-?")) < 300:
        with suppress(yaml.YAMLError, ValueError):
            fast = _FastLoader(text)
            return fast, fast.get_single_node()
    loader = _Loader(text)  # what it says of an error is what users read
    return loader, loader.get_single_node()


def dump_yaml(data: Any) -> str:
    """Plain values as YAML, invisible characters as escapes."""
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if text.replace("\n", "") == escape_controls(text.replace("\n", "")):
        return text
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=False)


class _Walk:
    """Walks through a document before it is constructed; each use of an alias counts."""

    def __init__(self, name: str, places: Places) -> None:
        self.name = name
        self.places = places
        self.count = 0

    def visit(self, node: yaml.Node, keys: tuple[str, ...]) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(
                f"{self.name}: its anchors and lists stand for more than {MAX_VALUES} values, "
                "which no configuration has: write out what is meant"
            )
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self.visit(item, (*keys, str(number)))
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                place = (*keys, self._key(key_node))
                if place in self.places:
                    raise ConfigError(
                        f"{self._where(key_node)}: '{'.'.join(place)}' is given twice"
                    )
                self.places[place] = self._where(key_node)
                self.visit(value_node, place)

    def _key(self, node: yaml.Node) -> str:
        if node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            return str(node.value)
        found = shortened(str(node.value), 40) if isinstance(node, yaml.ScalarNode) else "a list"
        raise ConfigError(
            f"{self._where(node)}: a key is a name, not {found or 'nothing'}: put it in quotes, or "
            "look for a colon too many"
        )

    def _where(self, node: yaml.Node) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}"
