"""Checks of a model's folder, before it is loaded."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from ppo_cli.errors import ModelError, ModelNotFoundError
from ppo_cli.utils.files import is_inside, refuse_stream
from ppo_cli.utils.text import shortened

ADAPTER_FILE = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_FILE, "tokenizer.json", "tokenizer_config.json")


def is_path(name: str) -> bool:
    """Whether `name` can only be a path, not a hub id."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_folder(name: str) -> None:
    """Check a model's folder; a name that is not a path is not checked.

    Raises:
        ModelNotFoundError: there is no such folder, or it holds no model.
        ModelError: its files name others outside of it, or it cannot be read.
        UsageError: a device, pipe or socket is among its files.
    """
    folder = Path(name)
    if not is_path(name):
        return
    if not os.path.exists(name):
        raise ModelNotFoundError(
            f"{name}: no such folder; give a run directory, another model folder, or a hub id"
        )
    if not folder.is_dir():
        raise ModelNotFoundError(f"{name} is a file: give the folder of a model, or a hub id")
    _check_files(folder)
    if any((folder / file).is_file() for file in MODEL_FILES):
        if (base := adapter_base(name)) and os.path.isdir(base):
            _check_files(Path(base))
        return
    if (folder / "run.yaml").is_file():
        raise ModelNotFoundError(
            f"{name} holds no model yet: its run has not ended, and checkpoints are for --resume "
            f"alone. End it with: ppo-cli train --output {shlex.quote(name)} --resume"
        )
    if (folder / "manifest.json").is_file() and folder.name.startswith("step-"):
        raise ModelNotFoundError(
            f"{name} is a checkpoint, from which a run is resumed, and no model: give the run "
            "directory"
        )
    raise ModelNotFoundError(
        f"{name} holds no model (no config.json): give a run directory, or a folder that "
        "transformers' save_pretrained wrote"
    )


def adapter_base(name: str) -> str | None:
    """The base model of an adapter in the folder `name`; None where there is no adapter."""
    return base_model(Path(name) / ADAPTER_FILE)[0]


def base_model(adapter_config: Path) -> tuple[str | None, str | None]:
    """Name and revision of the base model, by an adapter's configuration; None where not given."""
    settings = _read_object(adapter_config)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        return None, None
    return name, revision if isinstance(revision, str) else None


def _check_files(folder: Path) -> None:
    """Check the files of a model.

    Raises:
        UsageError: a device, pipe or socket is among them.
        ModelError: the folder cannot be read, or a file names others outside of it.
    """
    try:
        files = [*folder.iterdir()]
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror or error}") from error
    for file in files:
        refuse_stream(file)
    configs = folder / "config.json", folder / "tokenizer_config.json"
    for file in (*folder.glob("*.index.json"), *configs):
        content = _read_object(file)
        shards, tokenizers = content.get("weight_map"), content.get("fast_tokenizer_files")
        named = [content.get("transformers_weights")]
        named += shards.values() if isinstance(shards, dict) else ()
        named += tokenizers if isinstance(tokenizers, list) else ()
        for other in {name for name in named if isinstance(name, str)}:
            if not is_inside(other):
                raise ModelError(
                    f"{file} names {shortened(other, 60)}, which is outside of the folder and is "
                    "not read: copy it there, or give another model"
                )
            refuse_stream(folder / other)


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none: loading gives the better message."""
    try:
        content = json.loads(file.read_bytes()) if os.path.isfile(file) else None
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}
