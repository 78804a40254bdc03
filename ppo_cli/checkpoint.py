"""Checkpoints: all state of a run in safetensors and JSON, there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_cli.errors import UsageError
from ppo_cli.files import settle, sync

STATE_FILE = "state.json"
TENSORS_FILE = "tensors.safetensors"
WEIGHTS_FILE = "weights.safetensors"
TENSOR_KEY = "__tensor__"
PAIRS_KEY = "__pairs__"


def save_checkpoint(
    folder: Path, step: int, model: torch.nn.Module, state: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step-N`, then delete all but the `keep` newest.

    Args:
        folder: the run's checkpoints.
        step: N.
        model: its trainable parameters are saved; the others are still those of its source.
        state: nested dictionaries and lists of plain values and tensors.
        keep: how many checkpoints stay.
    """
    target = folder / f"step-{step:06d}"
    unfinished = folder / f".{target.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = _to_json(dict(state), tensors)
    save_file(_trainable(model), unfinished / WEIGHTS_FILE)
    save_file(tensors, unfinished / TENSORS_FILE)
    (unfinished / STATE_FILE).write_text(json.dumps(tree), encoding="utf-8")
    settle(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    sync(folder)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in `folder`.

    Raises:
        UsageError: there is none.
    """
    found = _checkpoints(folder)
    if not found:
        raise UsageError(
            f"{folder.parent} has no checkpoint to resume from: train anew with --overwrite"
        )
    return found[-1]


def load_checkpoint(path: Path, model: torch.nn.Module) -> dict[str, Any]:
    """Put the saved weights into `model`; return the saved state."""
    weights = load_file(path / WEIGHTS_FILE)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    tree = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    state: dict[str, Any] = _from_json(tree, load_file(path / TENSORS_FILE))
    return state


def _trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor moved into `tensors` and a reference in its place."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR_KEY: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(item, tensors) for key, item in value.items()}
        return {PAIRS_KEY: [[key, _to_json(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, tensors) for item in value]
    return value


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if TENSOR_KEY in value:
            return tensors[value[TENSOR_KEY]]
        if PAIRS_KEY in value:
            return {key: _from_json(item, tensors) for key, item in value[PAIRS_KEY]}
        return {key: _from_json(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    return value
