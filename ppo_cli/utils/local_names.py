"""Names for others to read: no folders of this machine, no secrets."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ppo_cli.errors import without_secrets
from ppo_cli.utils.model_folder import is_path

Records = Mapping[str, Mapping[str, Any]]
REST = r"(?:[/\\][^\s\"'`<>|*?]*)?"  # of a path after a known folder
QUOTED_PATH = re.compile(r"(?<=[`\"'])(?:/|~/|[A-Za-z]:\\)[^`\"'\n]+(?=[`\"'])")


def hub_id(name: str, record: Mapping[str, Any] | None) -> str | None:
    """`name`, if it is an id on the hub.

    Args:
        name: as the configuration has it; a relative path may look like an id.
        record: of the input in `run.yaml`, which for the hub has a commit. Without one the name
            decides.
    """
    if record and ("commit" in record or "files" in record):
        return name if "commit" in record else None
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return name if is_id and not is_path(name) else None


def public_name(name: str, record: Mapping[str, Any] | None = None) -> str:
    """`name` of a model or file, without the folders that lead to it; a hub's id is kept."""
    if "://" in name or hub_id(name, record) is not None:
        return without_secrets(name)
    return _last_part(name)


def public_text(text: str) -> str:
    """`text` without secrets, and without paths into folders of this machine: the last part stays.

    These are the home folder, the folder for temporary files and the working directory.
    """
    places = {Path.home(), Path(tempfile.gettempdir()), Path.cwd()}
    names = {os.path.realpath(place) for place in places} | {str(place) for place in places}
    known = sorted((n for n in names if len(Path(n).parts) > 1), key=len, reverse=True)
    pattern = rf"(?<![\w/])(?:{'|'.join(map(re.escape, known))})(?![\w-]){REST}"
    text = re.sub(pattern, lambda found: _last_part(found[0]), text)
    return without_secrets(text)


def public_card(text: str) -> str:
    """`public_text` of a model card, where quotes and backquotes hold no other absolute path."""
    return public_text(QUOTED_PATH.sub(lambda found: _last_part(found[0]), text))


def public_values(value: Any, records: Records, *, only_names: bool = False) -> Any:
    """Nested plain values with `public_text` for each text.

    Args:
        value: dictionaries, lists and plain values.
        records: of inputs, by their names, which tell ids on the hub from relative paths.
        only_names: whether every text with a slash is a name, as in a configuration, so that a
            relative path is shortened too.
    """
    if isinstance(value, dict):
        return {
            key: public_values(
                item, records, only_names=only_names or str(key).endswith("name_or_path")
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [public_values(item, records, only_names=only_names) for item in value]
    if not isinstance(value, str):
        return value
    if only_names and ("/" in value or "\\" in value) and "\n" not in value:
        return public_name(value, records.get(value))
    return public_text(value)


def public_json(content: bytes, records: Records) -> bytes:
    """A JSON file's content with `public_values`; unchanged where there is nothing to hide."""
    value = json.loads(content)
    public = public_values(value, records)
    if public == value:
        return content
    return (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _last_part(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\")).name or "."
