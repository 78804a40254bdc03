"""Texts from files, folders, addresses and hub datasets, all of them read by `datasets`."""

from __future__ import annotations

import csv
import glob
import io
import json
import lzma
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

from ppo_cli.errors import DataError, did_you_mean
from ppo_cli.utils.hub import first_line, is_path, loading_errors
from ppo_cli.utils.text import shortened

EMBEDDED = "embedded"
FILE_ENDINGS = (".arrow", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
ARCHIVE = ".zip"
NEEDED = f"a file ending in {', '.join(FILE_ENDINGS)} (or one of these with .gz, or a .zip)"
DELIMITERS = (",", ";", "\t")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
HEAD = 2**16  # bytes that show a file's encoding and a table's columns
BATCH = 256  # rows that are texts at once: a table may hold a megabyte in each


@dataclass(frozen=True)
class _File:
    """A file to read: its name for people, where `datasets` finds it, its ending."""

    name: str
    address: str
    ending: str
    compression: str | None = None

    @classmethod
    def of(cls, name: str, address: str) -> _File:
        """Raise `DataError` for an ending that says nothing about what is inside."""
        stem, ending = os.path.splitext(name.lower())
        compression = COMPRESSED.get(ending)
        if compression:
            ending = os.path.splitext(stem)[1]
        if ending not in FILE_ENDINGS:
            raise DataError(f"{name}: {NEEDED} is needed")
        return cls(name, address, ending, compression)

    def open(self) -> Any:
        """Its bytes, decompressed, as a context manager."""
        import fsspec

        return fsspec.open(self.address, "rb", compression=self.compression)


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
    """The texts of a source that `keep` accepts, at most `limit` of them. Blank ones are left out.

    Args:
        source: a file, a pattern of files, a folder, an http address, or a dataset's hub id.
        column: the column that holds the text; `.txt` files have none.
        subset: of a hub dataset, or of a folder whose README.md has several.
        split: of a hub dataset or a folder.
        distinct: leave repeats out, which count towards the limit nevertheless.

    Raises:
        DataError: absent, unreadable, empty, in an encoding that is not known, without `column`.
    """
    texts = iter(_texts(source, column, subset, split))
    first = next(texts, None)
    if first is None:
        raise DataError(f"{_shown(source)} holds no texts: it is empty")
    found = (text for part in ([first], texts) for text in part if keep(text))
    return list((dict.fromkeys if distinct else list)(islice(found, limit)))


def source_files(source: str, subset: str | None = None, split: str = "train") -> list[Path]:
    """The files that a source is read from, in order; none for a hub id, an address, `embedded`.

    Raises:
        DataError: no such file, or a folder without `split`.
    """
    if source == EMBEDDED or "://" in source:
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path, subset, split)
    if os.path.exists(path):
        if not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path}: {NEEDED} is needed")
        return [path]
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if files := [file for file in files if file.is_file()]:
            return files
        raise DataError(f"{source}: no file has a name like this")
    if path.suffix.lower() in (*FILE_ENDINGS, *COMPRESSED, ARCHIVE) or is_path(source):
        raise DataError(
            f"{path}: no such file; give {NEEDED}, a folder of these, or the hub id of a dataset"
        )
    return []


def check_encodable(text: str, place: str) -> None:
    """Raise `DataError` for halves of surrogate pairs, which stand for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start + 1} ({text[error.start]!r}) is no text: it must be "
            "UTF-8"
        ) from error


def _shown(source: str) -> str:
    """A source for people: an address without what may be a password or a key."""
    if "://" not in source:
        return source
    parts = urlparse(source)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, params="", query="", fragment="").geturl()


def _texts(source: str, column: str, subset: str | None, split: str) -> Iterator[str]:
    """Texts that are not blank, one after the other, each checked."""
    local = source_files(source, subset, split)
    if (folder := Path(source).expanduser()).is_dir():
        _tell_what_is_left_out(folder, local)
    # Files are streamed: no copy of them in a cache, which would cost the disk as much again and
    # could be stale or half written. The folder is for the library's locks and for downloads.
    with TemporaryDirectory(prefix="ppo-cli-") as cache, _quiet_library():
        read = _Reader(cache, column)
        if "://" in source:
            files = _members(_shown(source), read.download(source))
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


def _members(name: str, address: str) -> list[_File]:
    """The file itself, or the files of an archive. `name` says by its ending which it is."""
    if os.path.splitext(name.lower())[1] != ARCHIVE:
        return [_File.of(name, address)]
    try:
        with zipfile.ZipFile(address) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
    except zipfile.BadZipFile as error:
        raise DataError(f"{name} is not a whole zip file: {error}") from error
    return [
        _File.of(f"{name}/{member}", f"zip://{member}::{address}")
        for member in sorted(members)
        if not member.startswith(("__MACOSX/", "."))
    ]


def _folder_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files of a split, as `datasets` finds them by names, README.md or `save_to_disk`."""
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
    """Warn of files of another kind, of which `datasets` reads the most frequent alone."""
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
            problem = " ".join(str(error).split())[:300]  # what there is comes on a second line
            raise DataError(f"{folder} cannot be read as a dataset: {problem}") from error
    return {
        str(split): [Path(file) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }


class _Reader:
    """Reads files, each by its ending.

    Args:
        cache: a folder for what `datasets` has to write.
        column: the column that holds the text.
    """

    def __init__(self, cache: str, column: str) -> None:
        self._cache = cache
        self._column = column
        self._readers: dict[str, Callable[[_File], Iterator[Any]]] = {
            ".txt": self._lines,
            ".csv": self._csv,
            ".tsv": self._csv,
            ".jsonl": self._jsonl,
            ".ndjson": self._jsonl,
            ".json": self._json,
            ".parquet": self._parquet,
            ".arrow": self._arrow,
        }

    def __call__(self, file: _File) -> Iterator[Any]:
        """The cells of the column, row by row.

        Raises:
            DataError: the file cannot be read.
        """
        import pyarrow

        try:
            yield from self._readers[file.ending](file)
        except DataError:
            raise
        except (MemoryError, pyarrow.lib.ArrowCapacityError) as error:
            raise DataError(
                f"{file.name} holds more text than there is memory for: give less of it"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.name}: byte {_first_bad_byte(file)} is not UTF-8; convert the file, for "
                "example with iconv -f latin1 -t utf-8"
            ) from error
        except pyarrow.ArrowException as error:
            if file.ending == ".json":
                raise DataError(_json_problem(file)) from error
            kind = {".parquet": "Parquet", ".arrow": "Arrow"}.get(file.ending, "text")
            raise DataError(
                f"{file.name} is not a whole {kind} file: {first_line(error)}"
            ) from error
        except OSError as error:
            raise DataError(
                f"{file.name} cannot be read: {error.strerror or first_line(error)}"
            ) from error
        except (ValueError, RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:
            if file.ending == ".json":
                raise DataError(_json_problem(file)) from error
            problem = first_line(error)
            if file.ending in (".csv", ".tsv"):
                problem = _parser_problem(problem)
            raise DataError(f"{file.name} cannot be read: {problem}") from error

    def download(self, address: str) -> str:
        """A copy of what is at an address, which then need not be answered for in parts.

        Raises:
            DataError: it is none of a file over http, or nothing comes from there.
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
        copy = Path(self._cache, Path(parts.path).name)
        try:
            with copy.open("wb") as file:
                http_get(address, file, displayed_filename=shown)
        except Exception as error:  # of the client library, whose name has changed before
            problem = first_line(error).replace(address, shown)
            raise DataError(f"{shown} cannot be fetched: {problem}") from error
        return str(copy)

    def _rows(self, kind: str, file: _File, **options: Any) -> Any:
        from datasets import load_dataset

        return load_dataset(
            kind,
            data_files=[glob.escape(file.address)],
            split="train",
            streaming=True,
            cache_dir=self._cache,
            **options,
        )

    def _column_of(self, rows: Any, column: str) -> Iterator[Any]:
        for batch in rows.select_columns([column]).iter(batch_size=BATCH):
            yield from batch[column]

    def _lines(self, file: _File) -> Iterator[str]:
        encoding = _encoding(_head(file))
        yield from self._column_of(self._rows("text", file, encoding=encoding), "text")

    def _jsonl(self, file: _File) -> Iterator[Any]:
        # The library's own reader takes blocks of 10 MB at once, guesses types, and cannot say
        # which line is wrong.
        for number, line in enumerate(self._lines(file), start=1):
            if line.strip():
                yield _cell(f"{file.name}, line {number}", self._column, line)

    def _json(self, file: _File) -> Iterator[Any]:
        head = _head(file)
        if _encoding(head) != "utf-8-sig":
            raise DataError(f"{file.name} is UTF-16: convert it, with iconv -f utf-16 -t utf-8")
        lines = head.decode("utf-8-sig", errors="ignore").strip().split("\n")
        if not lines[0]:
            return
        if _is_json(lines[0]) and lines[0].startswith(("{", '"')):  # one to a line, maybe one alone
            yield from self._jsonl(file)
            return
        rows = self._rows("json", file)
        for batch in rows.iter(batch_size=BATCH):
            _need_column(file.name, self._column, batch)
            yield from batch[self._column]

    def _csv(self, file: _File) -> Iterator[Any]:
        from datasets import Features, Value

        head = _head(file)
        encoding = _encoding(head)
        text = head.decode(encoding, errors="replace" if len(head) == HEAD else "strict")
        delimiter = _delimiter(text, self._column)
        rows = _table(text, delimiter)
        header, first = next(filter(None, rows), None), next(filter(any, rows), None)
        if header is None or (first is None and len(head) < HEAD):
            return
        _need_column(file.name, self._column, header)
        if first is not None and any(cell.strip() for cell in first[len(header) :]):
            raise DataError(
                f"{file.name}: its first row has {len(first)} cells, its header {len(header)}: put "
                f"texts that hold '{delimiter}' in quotation marks"
            )
        # All cells are texts: no numbers, dates, or "null" are guessed.
        yield from self._column_of(
            self._rows(
                "csv",
                file,
                sep=delimiter,
                encoding=encoding,
                features=Features({name: Value("string") for name in _distinct(header)}),
                index_col=False,
                na_filter=False,
            ),
            self._column,
        )

    def _parquet(self, file: _File) -> Iterator[Any]:
        _need_column(file.name, self._column, self._rows("parquet", file).column_names)
        rows = self._rows("parquet", file, columns=[self._column], batch_size=BATCH)
        yield from self._column_of(rows, self._column)

    def _arrow(self, file: _File) -> Iterator[Any]:
        rows = self._rows("arrow", file)
        _need_column(file.name, self._column, rows.column_names)
        yield from self._column_of(rows, self._column)


def _hub_values(name: str, column: str, subset: str | None, split: str) -> Iterator[Any]:
    """The cells of a hub dataset, which stays in the library's cache."""
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
        except ValueError as error:  # an unknown subset or split; the message lists what there is
            raise DataError(f"{name}: {str(error).splitlines()[0]}") from error
    _need_column(name, column, data.column_names)
    for batch in data.select_columns([column]).iter(batch_size=BATCH):
        yield from batch[column]


@contextmanager
def _quiet_library() -> Iterator[None]:
    """What goes wrong is said once, by us."""
    from datasets import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _head(file: _File) -> bytes:
    with file.open() as opened:
        return bytes(opened.read(HEAD))


def _encoding(head: bytes) -> str:
    return MARKS.get(head[:2], "utf-8-sig")


def _first_bad_byte(file: _File) -> int:
    """The library decodes in chunks and counts from the start of one."""
    try:
        with file.open() as opened:
            opened.read().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _table(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=delimiter)


def _delimiter(text: str, column: str) -> str:
    """The first by which the header has the column; failing that, the one that divides it most."""
    headers = {
        delimiter: next(filter(None, _table(text, delimiter)), []) for delimiter in DELIMITERS
    }
    for delimiter, header in headers.items():
        if column in header:
            return delimiter
    return max(DELIMITERS, key=lambda delimiter: len(headers[delimiter]))


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of columns, each once, as pandas gives them: a, a.1 ..."""
    found: dict[str, None] = {}
    for place, name in enumerate(names):
        base = unique = name or f"Unnamed: {place}"
        count = 0
        while unique in found:
            count += 1
            unique = f"{base}.{count}"
        found[unique] = None
    return list(found)


def _cell(place: str, column: str, line: str) -> Any:
    """What a line of JSON has in the column: a text, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place}: not JSON ({problem})") from error
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise DataError(f"{place}: an object or a string is needed")
    _need_column(place, column, row)
    if row[column] is not None and not isinstance(row[column], str):
        raise DataError(f"{place}: '{column}' is not a text")
    return row[column]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_problem(file: _File) -> str:
    """Why a whole document of JSON cannot be read as rows."""
    try:
        with file.open() as opened:
            json.loads(opened.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"{file.name}, line {error.lineno}: not JSON ({error.msg})"
    except (ValueError, RecursionError) as error:
        return f"{file.name}: not JSON ({first_line(error)})"
    return f"{file.name}: a list of objects or of strings is needed, or one of them a line"


def _parser_problem(problem: str) -> str:
    """What pandas says of a table, without the names of its parts."""
    problem = problem.removeprefix("Error tokenizing data. C error: ")
    if problem.startswith("EOF inside string"):
        return f"a quotation mark in row {problem.rpartition(' ')[2]} is never closed"
    if problem.startswith("Expected"):
        return f"{problem}: put texts that hold the delimiter in quotation marks"
    return problem


def _need_column(place: str, column: str, names: Iterable[str]) -> None:
    names = list(names)
    if column not in names:
        shown = [shortened(name, 40) for name in names[:20]] + ["..."] * (len(names) > 20)
        raise DataError(
            f"{place}: no column '{column}'; it has {', '.join(shown)}."
            f"{did_you_mean(column, names)} (set prompts.text_column)"
        )
