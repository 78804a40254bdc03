"""The list of the files that a run wrote, and the owner of a file: a run, a model or neither.

`--overwrite` deletes the files on the list and refuses a folder that holds others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from filecmp import cmp
from pathlib import Path, PurePosixPath

from ppo_cli.errors import ConfigError, UsageError
from ppo_cli.utils.files import is_inside, is_same_place, write_text
from ppo_cli.utils.model_folder import MODEL_FILES
from ppo_cli.utils.yaml_io import read_yaml

MARKER = "ppo-cli.json"
WRITER = "ppo-cli"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.json"
LOCK_FILES = {LOCK_FILE, HOLDER_FILE, f".{HOLDER_FILE}.tmp"}
STATE_FILE = "state.json"  # of a checkpoint
LOGS = "logs"  # of trackers; on the list as `logs/`, which stands for all that is in it
TRACKERS_FILE = "trackers.json"
CHECKPOINT_FILES = ("weights.safetensors", "tensors.safetensors", STATE_FILE, "manifest.json")
# What one process wrote of a sharded model, in place of the two above.
CHECKPOINT_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
UNFINISHED_MODEL = ".model.tmp"
UNFINISHED_FILE = re.compile(r"\.(.+)\.tmp")
STEP_FOLDER = re.compile(r"step-\d+(\.\d+)?")
UNFINISHED_STEP = re.compile(r"\.step-\d+(\.\d+)?\.(tmp|old)")
# Names of a run's files, except for those of rare tokenizers.
RUN_FILE = re.compile(
    r"run\.yaml|README\.md|trackers\.json|(metrics|samples)\.jsonl|training\.png|frontier\.(json|png)"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|(model(-\d{5}-of-\d{5})?|value_head)\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.jinja"
    r"|(spiece|tokenizer|sentencepiece|sentencepiece\.bpe|spm)\.model"
)
# These identify runs of releases that kept no list.
OLD_RECORD = "run.yaml"
OLD_SECTIONS = {"policy", "prompts", "rollout", "reward", "ppo", "run"}
# Files in a model's folder, by transformers, peft, TRL and others.
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)(\.index\.json)?", re.IGNORECASE
)
MODEL_FILE = re.compile(
    rf"{WEIGHTS.pattern}|README\.md|(\w+_)?config\.json|tokenizer[\w.-]*\.json|vocab[\w.-]*"
    r"|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.(model|spm|jinja|tiktoken|py)",
    re.IGNORECASE,
)
SHOWN = 5  # names in a message


class Inventory:
    """The files that a run wrote into `folder`, listed in a file there.

    A file is listed before it is written, so that a kill leaves no unlisted file. A name that ends
    in a slash is a folder, with all that is in it. Checkpoints are not listed: their names, and
    those of their files, are always the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: frozenset[str] = frozenset()

    def names(self) -> frozenset[str] | None:
        """Read the relative paths of what the run wrote; None if no run wrote the folder."""
        marker = self.folder / MARKER
        try:
            content = json.loads(marker.read_bytes()) if os.path.isfile(marker) else None
        except (OSError, ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and content.get("written_by") == WRITER:
            names = content.get("files")
            if isinstance(names, list) and all(isinstance(n, str) and is_inside(n) for n in names):
                return frozenset(names)
        return self._names_of_old_run()

    def begin(self, names: Collection[str]) -> None:
        """Delete the files of an older run, and start the list of a new one with `names`.

        The old checkpoints are deleted first, so that a kill leaves no mixture of two runs. The old
        list stays until the end, so that the rest can be replaced; the lock stays, too.
        """
        self._clear(self.names() or frozenset())
        self._write(frozenset(names))

    def add(self, names: Collection[str], source: Path | None = None) -> None:
        """Add files to the list, before they are written.

        Args:
            names: of the files.
            source: the folder in which they lie until then.

        Raises:
            UsageError: a file of that name exists and is not on the list.
        """
        if self._written.issuperset(names):
            return
        listed = self.names() or frozenset()

        def is_strange(name: str) -> bool:
            path = self.folder / name
            if name in listed or not os.path.lexists(path):
                return False
            is_same = source is not None and _is_file(path) and cmp(path, source / name, False)
            return not is_same

        if strange := list(filter(is_strange, names)):
            raise UsageError(
                f"{self.folder} holds {shown(strange)}, which the run would replace but did not "
                "write: move that elsewhere"
            )
        self._write(listed.union(names))

    def listed(self, pattern: re.Pattern[str]) -> list[str]:
        """Names on the list that match `pattern`."""
        return sorted(filter(pattern.fullmatch, self.names() or ()))

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that are on the list; they stay on it."""
        for name in names:
            path = self.folder / name
            if _is_file(path):
                path.unlink()
            for parent in [*path.relative_to(self.folder).parents][:-1]:
                _remove_if_empty(self.folder / parent)

    def strangers(self) -> list[str]:
        """Names in the folder that no run wrote: unlisted files, links, folders (`name/`)."""
        return sorted(_strangers(self.folder, self.names() or frozenset()))

    def _clear(self, names: Collection[str]) -> None:
        for path in self.folder.glob(f"{CHECKPOINTS}/*step-*"):
            is_step = STEP_FOLDER.fullmatch(path.name) and _is_folder(path)
            if is_step or is_unfinished_checkpoint(path):
                shutil.rmtree(path)
        if _is_folder(self.folder / UNFINISHED_MODEL):
            shutil.rmtree(self.folder / UNFINISHED_MODEL)
        for name in sorted(
            names, key=lambda name: name == OLD_RECORD
        ):  # the record, which identifies an old run, is the last
            path = self.folder / name
            if name.endswith("/") and _is_folder(path):
                shutil.rmtree(path)
            for ours in (path.with_name(f".{path.name}.tmp"), path):
                if _is_file(ours):
                    ours.unlink()
            for parent in [*path.relative_to(self.folder).parents][:-1]:
                _remove_if_empty(self.folder / parent)

    def _write(self, names: frozenset[str]) -> None:
        content = {
            "written_by": WRITER,
            "about": "what --overwrite replaces, beside checkpoints/; it deletes nothing else",
            "files": sorted(names),
        }
        write_text(self.folder / MARKER, json.dumps(content, indent=2) + "\n")
        self._written = names

    def _names_of_old_run(self) -> frozenset[str] | None:
        record = self.folder / OLD_RECORD
        if not os.path.isfile(record):
            return None
        try:
            written = read_yaml(record)
        except ConfigError:
            return None
        config = written.get("config") if isinstance(written, dict) else None
        if not isinstance(config, dict) or not config.keys() >= OLD_SECTIONS:
            return None
        names = {OLD_RECORD}
        # Without these the folder may hold a copy of run.yaml among other files.
        if _is_folder(self.folder / CHECKPOINTS) or _is_file(self.folder / "metrics.jsonl"):
            found = map(_finished, os.listdir(self.folder))
            names |= {name for name in found if RUN_FILE.fullmatch(name)}
        return frozenset(names)


def shown(names: Collection[str]) -> str:
    """The first names, and the number of the others."""
    first = ", ".join(list(names)[:SHOWN])
    return first if len(names) <= SHOWN else f"{first} and {len(names) - SHOWN} more"


def checkpoint_strangers(checkpoint: Path) -> list[str]:
    """Names in a checkpoint's folder beside its files."""
    return sorted(
        entry.name
        for entry in os.scandir(checkpoint)
        if not (entry.name in CHECKPOINT_FILES or CHECKPOINT_SHARD.fullmatch(entry.name))
        or not entry.is_file(follow_symlinks=False)
    )


def is_unfinished_checkpoint(path: Path) -> bool:
    """Whether `path` is the folder of a checkpoint that was being written or deleted."""
    return UNFINISHED_STEP.fullmatch(path.name) is not None and _is_folder(path)


def refuse_owned(output: Path, inputs: Iterable[str], allowed: Collection[Path] = ()) -> None:
    """Raise `UsageError` where a result would replace a file of a model or a run, or an input.

    Args:
        output: the file to write.
        inputs: files and folders that the result is made from; other names are ignored.
        allowed: files of runs that may be replaced nevertheless.
    """
    if any(is_same_place(output, path) for path in allowed):
        return
    remedy = "and is not replaced: choose another name"
    if lies_in_checkpoints(output):
        raise UsageError(f"{output} lies among a run's checkpoints: choose another folder")
    folder = Path(os.path.realpath(output.parent))
    kind, is_owned = _ownership(folder)
    if is_owned(output.name):
        raise UsageError(f"{output} is a file of the {kind} {output.parent} {remedy}")
    if not os.path.exists(output):
        return
    if WEIGHTS.fullmatch(output.name):
        raise UsageError(f"{output} holds a model's weights {remedy}")
    # A file may have several names: links, or other case.
    read = ("/dev/stdin" if name == "-" else os.path.expanduser(name) for name in inputs)
    for place in (folder, *map(Path, read)):
        files = [place]
        if os.path.isdir(place):
            kind, is_owned = _ownership(place)
            files = [path for path in place.iterdir() if is_owned(path.name)]
        for file in files:
            if is_same_place(file, output):
                raise UsageError(f"{output} is the same file as {file} {remedy}")


def lies_in_checkpoints(path: Path) -> bool:
    """Whether `path`, which need not exist, lies in a run's folder of checkpoints."""
    return any(
        parent.name == CHECKPOINTS and Inventory(parent.parent).names() is not None
        for parent in Path(os.path.realpath(path)).parents
    )


def _ownership(folder: Path) -> tuple[str, Callable[[str], bool]]:
    """Kind of a folder, for messages, and a test whether a name in it is a model's or a run's."""
    listed = Inventory(folder).names()
    is_model = listed is not None or any(os.path.isfile(folder / file) for file in MODEL_FILES)

    def is_owned(name: str) -> bool:
        if listed is not None and (name in listed or name == MARKER or RUN_FILE.fullmatch(name)):
            return True
        return is_model and MODEL_FILE.fullmatch(name) is not None

    return "model" if listed is None else "run", is_owned


def _strangers(folder: Path, listed: frozenset[str], prefix: str = "") -> Iterator[str]:
    folders = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    for entry in os.scandir(folder / prefix):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if name == CHECKPOINTS:
                yield from _strange_checkpoints(folder / CHECKPOINTS)
            elif f"{name}/" in listed:
                continue
            elif name in folders:
                yield from _strangers(folder, listed, f"{name}/")
            elif name != UNFINISHED_MODEL:
                yield f"{name}/"
        elif not entry.is_file(follow_symlinks=False) or not (
            {name, prefix + _finished(entry.name)} & {*listed, MARKER}
        ):
            yield name


def _strange_checkpoints(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        name = f"{CHECKPOINTS}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if STEP_FOLDER.fullmatch(entry.name):
                yield from (f"{name}/{inner}" for inner in checkpoint_strangers(Path(entry.path)))
            elif not is_unfinished_checkpoint(Path(entry.path)):
                yield f"{name}/"
        elif entry.name not in LOCK_FILES or not entry.is_file(follow_symlinks=False):
            yield name


def _finished(name: str) -> str:
    """The final name of a temporary file of `replacing`; any other name is returned unchanged."""
    found = UNFINISHED_FILE.fullmatch(name)
    return found[1] if found else name


def _is_file(path: Path) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _remove_if_empty(folder: Path) -> None:
    if _is_folder(folder) and not any(folder.iterdir()):
        folder.rmdir()
