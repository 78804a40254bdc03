"""A run's model written to a folder of its own, whole or as an adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ppo_cli.config.policy import PolicyConfig
from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import UsageError
from ppo_cli.models.loading import (
    check_trusted,
    load_policy,
    load_tokenizer,
    reads_whole_texts,
)
from ppo_cli.models.pretrained import ADAPTER_WEIGHTS, VALUE_HEAD_FILE, WEIGHT_FILES
from ppo_cli.models.processor import FILES
from ppo_cli.models.saving import ADAPTER_FOLDER, write_model
from ppo_cli.training.run_directory import RunDirectory, loading_settings
from ppo_cli.utils.files import contains, refuse_special, settle, writing
from ppo_cli.utils.inventory import lies_in_checkpoints
from ppo_cli.utils.model_folder import ADAPTER_FILE, adapter_base, check_folder


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        form: the merged model or the adapter.
        base: folder or hub id of an adapter's base; None for a merged model.
        loader: transformers' class that loads the model or the base.
    """

    form: Literal["merged", "adapter"]
    base: str | None
    loader: str


def export_model(
    directory: RunDirectory,
    target: Path,
    *,
    form: Literal["merged", "adapter"] = "merged",
    dtype: torch.dtype | None = None,
    for_trl: bool = False,
    trusted: Collection[str] = (),
) -> Exported:
    """Write a run's model, its tokenizer and its value head into a new folder.

    The files are written beside `target` first, and renamed once all of them are there.

    Args:
        directory: of the run.
        target: the folder; absent or empty.
        form: the whole model, with an adapter merged; or the adapter alone.
        dtype: of the weights; None for that of the run's files.
        for_trl: also put the value head among the weights, where TRL up to 0.11 reads it.
        trusted: models whose own code may run.

    Raises:
        UsageError: the folder cannot be written, or the run has no adapter.
        ModelError: the run's model cannot be loaded.
    """
    check_target(directory, target)
    check_trusted(trusted, [str(directory.path)])
    check_folder(str(directory.path))
    unfinished = target.with_name(f".{target.name}.tmp")
    refuse_special(unfinished)
    base, is_seq2seq = None, reads_whole_texts(str(directory.path), None, trusted)
    try:
        with writing(target):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            if form == "adapter":
                base = _copy_adapter(directory, unfinished, dtype, trusted)
            else:
                _write_merged(directory, unfinished, dtype, trusted)
            if for_trl:
                _add_value_head_for_trl(unfinished)
            settle(unfinished)
            if target.exists():
                target.rmdir()
            unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    loader = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    return Exported(form, base, loader.__name__)


def check_target(directory: RunDirectory, target: Path) -> None:
    """Raise `UsageError` unless a folder can be written at `target`; change nothing."""
    refuse_special(target)
    if target.is_file():
        raise UsageError(f"{target} is a file: give the name of a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target} exists and is not empty: give the name of a new folder")
    if contains(directory.path, target) or lies_in_checkpoints(target):
        raise UsageError(f"{target} lies in a run directory: give a folder outside of it")
    parents = target.absolute().parents
    nearest = next(place for place in parents if os.path.exists(place))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"{target}: {nearest} is not a folder that can be written to")


def _write_merged(
    directory: RunDirectory, folder: Path, dtype: torch.dtype | None, trusted: Collection[str]
) -> None:
    """Write the whole model. An adapter is merged in float32, in which nothing is lost."""
    run = str(directory.path)
    own = loading_settings(directory, directory.config().policy)
    settings = PolicyConfig(model=run, precision="fp32", quantization=own.quantization)
    policy = load_policy(settings, None, trusted)
    write_model(policy.eval(), load_tokenizer(run, None, trusted), folder, "merged", dtype)
    _copy(directory.path, folder, FILES)


def _copy_adapter(
    directory: RunDirectory, folder: Path, dtype: torch.dtype | None, trusted: Collection[str]
) -> str | None:
    """Write the adapter; return the name of its base."""
    places = (directory.path / ADAPTER_FOLDER, directory.path)
    found = [place for place in places if (place / ADAPTER_FILE).is_file()]
    if not found:
        raise UsageError(_why_no_adapter(directory, directory.config()))
    _copy(found[0], folder, (ADAPTER_FILE, *ADAPTER_WEIGHTS))
    weights = folder / ADAPTER_WEIGHTS[0]
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _read(weights)}
        save_file(tensors, weights, metadata={"format": "pt"})
    load_tokenizer(str(directory.path), None, trusted).save_pretrained(folder)
    _copy(directory.path, folder, (VALUE_HEAD_FILE, *FILES))
    return adapter_base(str(folder))


def _why_no_adapter(directory: RunDirectory, config: RunConfig) -> str:
    if config.policy.adapter is None:
        return (
            f"{directory.path} has no adapter: all weights were trained. Export the whole model, "
            "with --merged"
        )
    return (
        f"{directory.path} holds the merged model alone (policy.adapter.save: merged): write the "
        f"adapter with 'ppo-cli train --output {directory.path} --resume --set "
        "policy.adapter.save=both', then export it"
    )


def _add_value_head_for_trl(folder: Path) -> None:
    """Put the value head into the file of the weights; beside an adapter it has one of its own."""
    weights, head = folder / WEIGHT_FILES[0], folder / VALUE_HEAD_FILE
    if (folder / f"{WEIGHT_FILES[0]}.index.json").exists():
        raise UsageError(
            f"{folder}: the weights take several files, in which TRL does not look for a value "
            "head: leave --trl out, or choose a smaller --dtype"
        )
    own = dict(_read(weights)) if weights.exists() else {}
    save_file({**own, **dict(_read(head))}, weights, metadata={"format": "pt"})


def _read(file: Path) -> Any:
    return load_file(file).items()


def _copy(source: Path, folder: Path, names: Collection[str]) -> None:
    """Copy those of the named files that are there and not yet in the folder."""
    for name in names:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
