"""The files with which a model reads pictures and sounds, carried from folder to folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.processing_utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    FEATURE_EXTRACTOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import cached_file

FILES = (
    FEATURE_EXTRACTOR_NAME,  # also that of image processors
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    CHAT_TEMPLATE_FILE,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)


def find_processor(model: Any, name: str, hub: dict[str, Any]) -> None:
    """Note in a model of several parts where the files of its processor are.

    Args:
        model: just loaded; its attribute `processor_files` gets the paths.
        name: folder or hub id that it was loaded from.
        hub: keywords of the hub.
    """
    model.processor_files = []
    if model.config.get_text_config() is model.config:
        return
    for file in FILES:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if found is not None:
            model.processor_files.append(found)


def copy_processor(policy: Any, folder: Path) -> None:
    """Copy a policy's processor files into a folder, but for those that the tokenizer has written.

    Args:
        policy: its language model has the attribute of `find_processor`, if it was loaded.
        folder: holds the files of the tokenizer.
    """
    for file in map(Path, getattr(policy.pretrained_model, "processor_files", ())):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
