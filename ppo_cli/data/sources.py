"""Finds the rows of a source: files, a folder, an address, or a dataset of the hub."""

from __future__ import annotations

import glob
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

from ppo_cli.config.prompts import PromptSource
from ppo_cli.data.columns import Cell, Columns, matches
from ppo_cli.data.readers import (
    ARCHIVE,
    BATCH,
    COMPRESSED,
    FILE_ENDINGS,
    NEEDED,
    DataFile,
    Reader,
    plain_columns,
)
from ppo_cli.errors import DataError, did_you_mean
from ppo_cli.utils.hub import first_line, loading_errors
from ppo_cli.utils.model_folder import is_path

EMBEDDED = "embedded"


def read_cells(
    settings: PromptSource, columns: Columns, seed: int = 0
) -> Iterator[tuple[str, Cell]]:
    """Read the rows of a source that `where` accepts, each with its place for messages.

    Args:
        settings: of the source, which is not `embedded`.
        columns: those to read.
        seed: of the shuffling of a stream.

    Raises:
        DataError: the source is absent, unreadable, not UTF-8, or lacks a column.
    """
    source = settings.source
    local = source_files(source, settings.subset, settings.split)
    if (folder := Path(source).expanduser()).is_dir():
        _tell_what_is_left_out(folder, local)
    on_hub = not local and "://" not in source
    for key in ("streaming", "revision"):
        if getattr(settings, key) and not on_hub:
            raise DataError(
                f"prompts.{key} is for hub datasets, and {shown_source(source)} is none"
            )
    # Files are streamed. A copy in a cache would need as much disk again and could be stale or half
    # written. The temporary folder holds the library's locks, and downloads.
    with TemporaryDirectory(prefix="ppo-cli-") as cache, _quiet_library():
        read = Reader(cache, columns)
        if on_hub:
            yield from _numbered(source, _hub_cells(settings, columns, seed))
            return
        if local:
            files = [file for path in local for file in _members(str(path), str(path))]
        else:
            files = _members(shown_source(source), _download(source, cache))
        for file in files:
            for place, cell in _numbered(file.name, read(file)):
                if matches(settings.where, cell[1]):
                    yield place, cell


def _numbered(name: str, cells: Iterator[Cell]) -> Iterator[tuple[str, Cell]]:
    for number, cell in enumerate(cells, start=1):
        yield f"{name}, text {number}", cell


def source_files(source: str, subset: str | None = None, split: str = "train") -> list[Path]:
    """The files that a source is read from, in order; none for a hub id, address or `embedded`.

    Raises:
        DataError: there is no such file, or the folder lacks `split`.
    """
    if source == EMBEDDED or "://" in source:
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path, subset, split)
    if os.path.exists(path):
        if not path.is_file():  # reading a pipe would wait for a writer
            raise DataError(f"{path}: {NEEDED} is needed")
        return [path]
    if glob.has_magic(source):
        if files := _named_files(path):
            return sorted(files, key=str)
        raise DataError(f"{source}: no file has a name like this")
    if path.suffix.lower() in (*FILE_ENDINGS, *COMPRESSED, ARCHIVE) or is_path(source):
        raise DataError(
            f"{path}: no such file; give {NEEDED}, a folder of these, or the hub id of a dataset"
        )
    return []


def all_files(source: str) -> list[Path]:
    """All files that a source names, also those that are not read; none where none exists."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return sorted(_named_files(path))


def _named_files(path: Path) -> list[Path]:
    """The file at `path`, or the files that it matches as a pattern."""
    if os.path.isfile(path):
        return [path]
    names = glob.glob(str(path), recursive=True)
    return [Path(name) for name in names if os.path.isfile(name)]


def check_encodable(text: str, place: str) -> None:
    """Raise `DataError` for halves of surrogate pairs, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start + 1} ({text[error.start]!r}) is no text: it must be "
            "UTF-8"
        ) from error


def shown_source(source: str) -> str:
    """A source for messages: an address without possible passwords and keys."""
    if "://" not in source:
        return source
    parts = urlparse(source)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, params="", query="", fragment="").geturl()


def _download(address: str, folder: str) -> str:
    """Download a file as a whole; return its path.

    Raises:
        DataError: the address is not that of a file over http, or the download fails.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    parts, shown = urlparse(address), shown_source(address)
    if parts.scheme not in ("http", "https"):
        raise DataError(
            f"{shown}: an address begins with https:// or http://; give {NEEDED}, or the hub "
            "id of a dataset"
        )
    if os.path.splitext(parts.path.lower())[1] not in (*FILE_ENDINGS, *COMPRESSED, ARCHIVE):
        raise DataError(
            f"{shown}: the address of {NEEDED} is needed; for a dataset of the hub give its "
            "id, owner/name"
        )
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{shown}: HF_HUB_OFFLINE forbids to fetch it; give a local file")
    copy = Path(folder, Path(parts.path).name)
    try:
        with copy.open("wb") as file:
            http_get(address, file, displayed_filename=shown)
    except Exception as error:  # of the client library, whose name has changed before
        problem = first_line(error).replace(address, shown)
        raise DataError(f"{shown} cannot be fetched: {problem}") from error
    return str(copy)


def _members(name: str, address: str) -> list[DataFile]:
    """The files of an archive, or the file itself, by the ending of `name`."""
    if os.path.splitext(name.lower())[1] != ARCHIVE:
        return [DataFile.of(name, address)]
    try:
        with zipfile.ZipFile(address) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
    except zipfile.BadZipFile as error:
        raise DataError(f"{name} is not a whole zip file: {error}") from error
    return [
        DataFile.of(f"{name}/{member}", f"zip://{member}::{address}")
        for member in sorted(members)
        if not member.startswith(("__MACOSX/", "."))
    ]


def _folder_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files of a split as `datasets` finds them: by names, README.md or `save_to_disk`."""
    if (folder / "dataset_dict.json").is_file():
        splits = {state.parent.name: state.parent for state in folder.glob("*/state.json")}
        by_split = {name: sorted(inner.glob("*.arrow")) for name, inner in splits.items()}
    elif (folder / "state.json").is_file():
        by_split = {split: sorted(folder.glob("*.arrow"))}  # one split, whatever its name
    else:
        by_split = _builder_files(folder, subset)
    if split not in by_split:
        raise DataError(
            f"{folder}: no split '{split}'; it has {', '.join(sorted(by_split))}."
            f"{did_you_mean(split, by_split)} (set prompts.split)"
        )
    return by_split[split]


def _tell_what_is_left_out(folder: Path, files: Sequence[Path]) -> None:
    """Warn about unread files: `datasets` reads only the most frequent kind in a folder."""
    kinds = {file.suffix.lower() for file in files}
    candidates = {".csv", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt"} - kinds
    others = {file.suffix.lower() for file in folder.rglob("*")} & candidates
    if others:
        warnings.warn(
            f"{folder}: its files ending in {', '.join(sorted(others))} are not read, beside those "
            f"in {', '.join(sorted(kinds))}: a pattern such as {folder}/*{min(others)} would be",
            stacklevel=2,
        )


def _builder_files(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    from datasets import load_dataset_builder

    with TemporaryDirectory(prefix="ppo-cli-") as cache, _quiet_library():
        try:
            builder = load_dataset_builder(str(folder.resolve()), subset, cache_dir=cache)
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no data: {NEEDED} is needed there") from error
        except Exception as error:
            problem = " ".join(str(error).split())[:300]  # the second line lists what exists
            raise DataError(f"{folder} cannot be read as a dataset: {problem}") from error
    return {
        str(split): [Path(file) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }


def _hub_cells(settings: PromptSource, columns: Columns, seed: int) -> Iterator[Cell]:
    """Read a hub dataset, which stays in the library's cache unless it is streamed."""
    name = settings.source
    with loading_errors(name, "dataset"):
        data = _load_hub(settings)
        if settings.streaming and settings.shuffle_buffer:
            data = data.shuffle(seed=seed, buffer_size=settings.shuffle_buffer)
        text, others = columns.choose(name, plain_columns(data))
        where = {column: _indices(data, column, v) for column, v in settings.where.items()}
        for batch in data.select_columns([text, *others]).iter(batch_size=BATCH):
            for cell in columns.pairs(batch, text, others):
                if matches(where, cell[1]):
                    yield cell


def _load_hub(settings: PromptSource) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = settings.source
    try:
        data = load_dataset(
            name,
            settings.subset,
            split=settings.split,
            revision=settings.revision,
            streaming=settings.streaming,
        )
    except DatasetNotFoundError as error:
        raise DataError(
            f"{name}: neither a file here nor a dataset on the hub (a private one needs "
            "HF_TOKEN); files end in " + ", ".join(FILE_ENDINGS)
        ) from error
    except ValueError as error:  # an unknown subset or split; the message lists the known ones
        raise DataError(f"{name}: {str(error).splitlines()[0]}") from error
    return data._resolve_features() if data.features is None else data


def _indices(data: Any, column: str, wanted: Any) -> list[Any]:
    """The values of `where` for a column; names of a hub dataset's labels become numbers.

    Raises:
        DataError: there is no such label.
    """
    values = wanted if isinstance(wanted, list) else [wanted]
    names = getattr(data.features[column], "names", None)  # of a ClassLabel
    for value in values:
        if names and isinstance(value, str) and value not in names:
            raise DataError(
                f"prompts.where: column '{column}' has no label '{value}'; it "
                f"has {', '.join(names)}.{did_you_mean(value, names)}"
            )
    return [names.index(v) if names and isinstance(v, str) else v for v in values]


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Silence the log of `datasets`: its errors become messages here."""
    from datasets import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
