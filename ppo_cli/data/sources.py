"""Finds the texts of a source: files, a folder, an address, or a dataset of the hub."""

from __future__ import annotations

import glob
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

from ppo_cli.data.readers import (
    ARCHIVE,
    BATCH,
    COMPRESSED,
    FILE_ENDINGS,
    NEEDED,
    DataFile,
    Reader,
    need_column,
)
from ppo_cli.errors import DataError, did_you_mean
from ppo_cli.utils.hub import first_line, loading_errors
from ppo_cli.utils.model_folder import is_path

EMBEDDED = "embedded"


def read_texts(
    source: str,
    *,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    keep: Callable[[str], bool] = bool,
    limit: int | None = None,
    distinct: bool = False,
) -> list[str]:
    """Read the texts of a source that `keep` accepts, at most `limit`, without blank ones.

    Args:
        source: a file, a pattern of files, a folder, an http address, or a dataset's hub id.
        column: the column of the texts; `.txt` files have none.
        subset: of a hub dataset, or of a folder whose README.md names several.
        split: of a hub dataset or a folder.
        distinct: leave repeats out; they count towards the limit nevertheless.

    Raises:
        DataError: the source is absent, unreadable, empty, not UTF-8, or lacks `column`.
    """
    texts = iter(_texts(source, column, subset, split))
    first = next(texts, None)
    if first is None:
        raise DataError(f"{_shown(source)} holds no texts: it is empty")
    found = (text for part in ([first], texts) for text in part if keep(text))
    return list((dict.fromkeys if distinct else list)(islice(found, limit)))


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


def _shown(source: str) -> str:
    """A source for messages: an address without possible passwords and keys."""
    if "://" not in source:
        return source
    parts = urlparse(source)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, params="", query="", fragment="").geturl()


def _texts(source: str, column: str, subset: str | None, split: str) -> Iterator[str]:
    """Read the texts of a source one by one; check each, skip blank ones."""
    local = source_files(source, subset, split)
    if (folder := Path(source).expanduser()).is_dir():
        _tell_what_is_left_out(folder, local)
    # Files are streamed. A copy in a cache would need as much disk again and could be stale or half
    # written. The temporary folder holds the library's locks, and downloads.
    with TemporaryDirectory(prefix="ppo-cli-") as cache, _quiet_library():
        read = Reader(cache, column)
        if "://" in source:
            files = _members(_shown(source), _download(source, cache))
        elif local:
            files = [file for path in local for file in _members(str(path), str(path))]
        else:
            yield from _only_texts(source, column, _hub_values(source, column, subset, split))
            return
        for file in files:
            yield from _only_texts(file.name, column, read(file))


def _only_texts(name: str, column: str, values: Iterable[Any]) -> Iterator[str]:
    for number, value in enumerate(values, start=1):
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(
                f"{name}, text {number}: column '{column}' holds {type(value).__name__}, not text"
            )
        check_encodable(value, f"{name}, text {number}")
        if value and not value.isspace():
            yield value


def _download(address: str, folder: str) -> str:
    """Download a file as a whole; return its path.

    Raises:
        DataError: the address is not that of a file over http, or the download fails.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    parts, shown = urlparse(address), _shown(address)
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


def _hub_values(name: str, column: str, subset: str | None, split: str) -> Iterator[Any]:
    """Read the column of a hub dataset, which stays in the library's cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    with loading_errors(name, "dataset"):
        try:
            data = load_dataset(name, subset, split=split)
        except DatasetNotFoundError as error:
            raise DataError(
                f"{name}: neither a file here nor a dataset on the hub (a private one needs "
                "HF_TOKEN); files end in " + ", ".join(FILE_ENDINGS)
            ) from error
        except ValueError as error:  # an unknown subset or split; the message lists the known ones
            raise DataError(f"{name}: {str(error).splitlines()[0]}") from error
    need_column(name, column, data.column_names)
    for batch in data.select_columns([column]).iter(batch_size=BATCH):
        yield from batch[column]


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
