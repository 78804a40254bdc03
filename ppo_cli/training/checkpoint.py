"""Checkpoints: the whole state of a run in safetensors and JSON, written whole or not at all.

A checkpoint is a folder `step-N`. It is written under another name, flushed to the disk and
renamed. Its manifest, written last, holds the SHA-256 of every other file, so that damage is found.
Of a sharded model each process writes its part (`shards.py`). Any number of processes, sharded or
not, reads either form.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_cli.errors import PPOCliError, is_out_of_memory
from ppo_cli.models.sharding import is_sharded
from ppo_cli.training.shards import is_part, read_shards, stored_tensors, write_shards
from ppo_cli.utils import processes
from ppo_cli.utils.files import settle, sync, writing
from ppo_cli.utils.inventory import (
    CHECKPOINT_FILES,
    CHECKPOINT_SHARD,
    checkpoint_strangers,
    is_unfinished_checkpoint,
)

WEIGHTS_FILE, TENSORS_FILE, STATE_FILE, MANIFEST_FILE = CHECKPOINT_FILES
TENSOR_NAME = re.compile(r"t\d+")  # of a tensor that is no weight
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
    """Write `folder/step-N`, then `prune`. All processes call it; all get its path.

    From the first checkpoint on there is a whole one at every instant: older ones are deleted last,
    and a step that is saved again gets another name (`step-N.1`).

    Args:
        folder: the run's checkpoints.
        step: N.
        model: its trainable parameters are saved; the others are those of the model it came from.
        state: nested dictionaries and lists of plain values and tensors. The main process's is
            written; of a sharded model the others' has the same sharded tensors, before any others.
        keep: as for `prune`.
        best: as for `prune`.
    """
    target, unfinished = processes.on_main(_begin, folder, step)
    try:
        if is_sharded(model):
            tensors: dict[str, Tensor] = {}
            tree = _to_json(dict(state), tensors)
            with writing(target):
                write_shards(unfinished, {**_trainable(model), **tensors})
            processes.on_main(_finish, unfinished, target, tree)
        else:
            processes.on_main(_write, unfinished, target, model, state)
    finally:
        if processes.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
    processes.on_main(prune, folder, keep, best)
    return target


def _begin(folder: Path, step: int) -> tuple[Path, Path]:
    """Where a checkpoint of a step is going to be, and the empty folder to write it to."""
    target = folder / f"step-{step:06d}"
    if again := [path for path in _checkpoints(folder) if _order(path)[0] == step]:
        target = folder / f"step-{step:06d}.{_order(again[-1])[1] + 1}"
    unfinished = folder / f".{target.name}.tmp"
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        unfinished.mkdir()
    return target, unfinished


def _write(
    unfinished: Path, target: Path, model: torch.nn.Module, state: Mapping[str, Any]
) -> None:
    """Write all files of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    tree = _to_json(dict(state), tensors)
    with writing(target):
        save_file(_trainable(model), unfinished / WEIGHTS_FILE)
        save_file(tensors, unfinished / TENSORS_FILE)
    _finish(unfinished, target, tree)


def _finish(unfinished: Path, target: Path, tree: Any) -> None:
    """Write the state and the manifest beside the tensors, flush all, and give it its name."""
    with writing(target):
        (unfinished / STATE_FILE).write_text(json.dumps(tree), encoding="utf-8")
        digests = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        manifest = json.dumps({"sha256": digests}, indent=2)
        (unfinished / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
        settle(unfinished)
        unfinished.rename(target)
        sync(target.parent)


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
    shards = set(filter(CHECKPOINT_SHARD.fullmatch, files))
    if files.keys() - shards != {STATE_FILE, *(() if shards else (TENSORS_FILE, WEIGHTS_FILE))}:
        return f"{MANIFEST_FILE} lists other files"
    if others := {file.name for file in path.glob("*.safetensors")} - files.keys():
        return f"{min(others)} is not on its list"  # all of them are read
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


def load_checkpoint(
    path: Path, model: torch.nn.Module, trained: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Load the saved weights into `model`; return the saved state.

    Args:
        path: the checkpoint.
        model: whole or sharded.
        trained: the weights in the optimizer's order. The moments of sharded ones are sharded
            alike.

    Raises:
        PPOCliError: the weights are those of another model.
    """
    load_weights(path, model)
    tree = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if _is_in_parts(path, model):
        stored, owners = stored_tensors(path), _owners(tree, trained)
        tensors = {
            name: _empty_like(tensor, owners.get(name))
            for name, tensor in stored.items()
            if TENSOR_NAME.fullmatch(name)
        }
        read_shards(path, tensors)
    else:
        tensors = load_file(path / TENSORS_FILE)
    state: dict[str, Any] = _from_json(tree, tensors)
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
    in_parts = _is_in_parts(path, model)
    weights = stored_tensors(path) if in_parts else load_file(path / WEIGHTS_FILE)
    weights = {name: value for name, value in weights.items() if not TENSOR_NAME.fullmatch(name)}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in parameters.items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise PPOCliError(
            f"{path} holds the weights of another model: policy.model has changed since; put the "
            "old one back, or train anew with --overwrite"
        )
    if in_parts:
        read_shards(path, parameters)
        return
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _is_in_parts(path: Path, model: torch.nn.Module) -> bool:
    """Whether a checkpoint or the model that it is read into is sharded."""
    return is_sharded(model) or not (path / WEIGHTS_FILE).exists()


def _empty_like(stored: Tensor, owner: Tensor | None) -> Tensor:
    """A tensor to read a stored one into, sharded as the weight that it belongs to is."""
    if owner is not None and is_part(owner) and owner.shape == stored.shape:
        return torch.zeros_like(owner, dtype=stored.dtype, requires_grad=False)
    return torch.zeros_like(stored, device="cpu")


def _owners(tree: Any, trained: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name of each tensor of the optimizer's state -> the weight that it belongs to."""
    states = tree["trainer"]["optimizer"]["state"].get(PAIRS_KEY, ())
    return {
        entry[TENSOR_KEY]: trained[i]
        for i, state in states
        for entry in state.values()
        if isinstance(entry, dict) and TENSOR_KEY in entry
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach() if is_part(parameter) else parameter.detach().cpu().contiguous()
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
        value = value.detach()
        tensors[name] = value if is_part(value) else value.cpu().clone().contiguous()
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
