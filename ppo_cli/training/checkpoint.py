"""Checkpoints: the whole state of a run in safetensors and JSON, written whole or not at all.

A checkpoint is a folder `step-N`. It is written under another name, flushed to the disk and
renamed. Its manifest, written last, holds the SHA-256 of every other file, so that damage is found.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_cli.errors import PPOCliError, is_out_of_memory
from ppo_cli.utils.files import settle, sync, writing
from ppo_cli.utils.inventory import CHECKPOINT_FILES, checkpoint_strangers, is_unfinished_checkpoint

WEIGHTS_FILE, TENSORS_FILE, STATE_FILE, MANIFEST_FILE = CHECKPOINT_FILES
TENSOR_KEY = "__tensor__"
PAIRS_KEY = "__pairs__"


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write `folder/step-N`, then `prune`.

    From the first checkpoint on there is a whole one at every instant: older ones are deleted last,
    and a step that is saved again gets another name (`step-N.1`).

    Args:
        folder: the run's checkpoints.
        step: N.
        model: its trainable parameters are saved; the others are those of the model it came from.
        state: nested dictionaries and lists of plain values and tensors.
        keep: as for `prune`.
        best: as for `prune`.
    """
    target = folder / f"step-{step:06d}"
    if again := [path for path in _checkpoints(folder) if _order(path)[0] == step]:
        target = folder / f"step-{step:06d}.{_order(again[-1])[1] + 1}"
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    unfinished = folder / f".{target.name}.tmp"
    try:
        with writing(target):
            _write(unfinished, model, state)
            unfinished.rename(target)
            sync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    prune(folder, keep, best)
    return target


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints but those of the `keep` newest steps and of step `best`.

    Of a step that was saved again, the last checkpoint is kept. Unfinished checkpoints of killed
    processes are deleted, too.
    """
    _sweep(folder)
    found = _checkpoints(folder)
    last = {_order(path)[0]: path for path in found}
    steps = {*list(last)[-keep:], best}
    _delete([path for path in found if path != last[_order(path)[0]]])
    _delete([path for step, path in last.items() if step not in steps])


def whole_checkpoint(folder: Path) -> Path:
    """Find the newest undamaged checkpoint in `folder`; warn about damaged newer ones.

    Raises:
        PPOCliError: there is none, or all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}: going on from {path.name}", stacklevel=2)
            return path
        damaged.append(f"{path} is damaged ({damage})")
    found = "; ".join(damaged) or f"{folder} is empty"
    raise PPOCliError(f"{found}: no checkpoint is left to go on from; train anew with --overwrite")


def checkpoint_of(folder: Path, step: int) -> Path:
    """Find the undamaged checkpoint of a step.

    Raises:
        PPOCliError: there is none, or it is damaged.
    """
    found = [path for path in _checkpoints(folder) if _order(path)[0] == step]
    if not found:
        raise PPOCliError(f"{folder} has no checkpoint of step {step}")
    if damage := find_damage(found[-1]):
        raise PPOCliError(f"{found[-1]} is damaged ({damage})")
    return found[-1]


def find_damage(path: Path) -> str | None:
    """Describe the damage to a checkpoint's files; None if there is none."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): str(digest) for name, digest in manifest["sha256"].items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} cannot be read"
    if set(files) != {STATE_FILE, TENSORS_FILE, WEIGHTS_FILE}:
        return f"{MANIFEST_FILE} lists other files"
    for name, digest in files.items():
        try:
            if _sha256(path / name) != digest:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def discard_newer(folder: Path, path: Path) -> None:
    """Delete the checkpoints that are newer than `path`: they are damaged."""
    _delete([other for other in _checkpoints(folder) if _order(other) > _order(path)])


def load_checkpoint(path: Path, model: torch.nn.Module) -> dict[str, Any]:
    """Load the saved weights into `model`; return the saved state.

    Raises:
        PPOCliError: the weights are those of another model.
    """
    load_weights(path, model)
    tree = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    state: dict[str, Any] = _from_json(tree, load_file(path / TENSORS_FILE))
    return state


@contextmanager
def state_faults(folder: Path) -> Iterator[None]:
    """Around restoring the newest state in `folder`, which another release may have written.

    Raises:
        PPOCliError: in place of any other error but lack of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PPOCliError) or is_out_of_memory(error):
            raise
        newest = _checkpoints(folder)[-1]
        message = " ".join(str(error).split())[:100]
        raise PPOCliError(
            f"{newest} holds no state that this release can go on from ({type(error).__name__}: "
            f"{message}): resume with the release that run.yaml names, delete that checkpoint if "
            "there is an older one, or train anew with --overwrite"
        ) from error


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Load the saved weights into `model`, and no other state.

    Raises:
        PPOCliError: the weights are those of another model.
    """
    weights = load_file(path / WEIGHTS_FILE)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in parameters.items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise PPOCliError(
            f"{path} holds the weights of another model: policy.model has changed since; put the "
            "old one back, or train anew with --overwrite"
        )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _write(folder: Path, model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Write all files of a checkpoint and flush them to the disk."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    tree = _to_json(dict(state), tensors)
    save_file(_trainable(model), folder / WEIGHTS_FILE)
    save_file(tensors, folder / TENSORS_FILE)
    (folder / STATE_FILE).write_text(json.dumps(tree), encoding="utf-8")
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = json.dumps({"sha256": digests}, indent=2)
    (folder / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
    settle(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _order(path) != (-1, 0)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    """Step in a checkpoint's name, and number of earlier saves; (-1, 0) for other names."""
    found = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def _delete(checkpoints: list[Path]) -> None:
    """Delete checkpoints, each renamed first, so that a kill leaves no half of one.

    A checkpoint that holds other files as well is kept.
    """
    for path in checkpoints:
        if strange := checkpoint_strangers(path):
            warnings.warn(f"{path} is kept: it holds {', '.join(strange)}", stacklevel=3)
            continue
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))


def _sweep(folder: Path) -> None:
    """Delete checkpoints that killed processes left half-written or half-deleted."""
    for path in filter(is_unfinished_checkpoint, folder.glob(".step-*")):
        shutil.rmtree(path)


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Move each tensor of `value` into `tensors`, with a reference in its place."""
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
