"""Reads the rows of one file, by its ending: lines, tables, JSON, Parquet, Arrow."""

from __future__ import annotations

import csv
import glob
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_cli.data.columns import Cell, Columns
from ppo_cli.errors import DataError
from ppo_cli.utils.hub import first_line

FILE_ENDINGS = (".arrow", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
ARCHIVE = ".zip"
NEEDED = f"a file ending in {', '.join(FILE_ENDINGS)} (or one of these with .gz, or a .zip)"
DELIMITERS = (",", ";", "\t")
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
HEAD_BYTES = 2**16  # of a file; they show its encoding and the columns of a table
BATCH = 256  # rows in memory at once: a table may hold a megabyte in each


@dataclass(frozen=True)
class DataFile:
    """A file to read: name for messages, address for `datasets`, ending."""

    name: str
    address: str
    ending: str
    compression: str | None = None

    @classmethod
    def of(cls, name: str, address: str) -> DataFile:
        """Make one; raise `DataError` for an unknown ending."""
        stem, ending = os.path.splitext(name.lower())
        compression = COMPRESSED.get(ending)
        if compression:
            ending = os.path.splitext(stem)[1]
        if ending not in FILE_ENDINGS:
            raise DataError(f"{name}: {NEEDED} is needed")
        return cls(name, address, ending, compression)

    def open(self) -> Any:
        """Open the file for reading, decompressed; a context manager."""
        import fsspec

        return fsspec.open(self.address, "rb", compression=self.compression)


class Reader:
    """Reads files by their endings.

    Args:
        cache: a folder for the files that `datasets` writes.
        columns: those to read.
    """

    def __init__(self, cache: str, columns: Columns) -> None:
        self._cache = cache
        self._columns = columns
        self._readers: dict[str, Callable[[DataFile], Iterator[Cell]]] = {
            ".txt": self._txt,
            ".csv": self._csv,
            ".tsv": self._csv,
            ".jsonl": self._jsonl,
            ".ndjson": self._jsonl,
            ".json": self._json,
            ".parquet": self._parquet,
            ".arrow": self._arrow,
        }

    def __call__(self, file: DataFile) -> Iterator[Cell]:
        """Read the file row by row.

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

    def _rows(self, kind: str, file: DataFile, **options: Any) -> Any:
        from datasets import load_dataset

        return load_dataset(
            kind,
            data_files=[glob.escape(file.address)],
            split="train",
            streaming=True,
            cache_dir=self._cache,
            **options,
        )

    def _pairs(self, rows: Any, text: str, others: list[str]) -> Iterator[Cell]:
        for batch in rows.select_columns([text, *others]).iter(batch_size=BATCH):
            yield from self._columns.pairs(batch, text, others)

    def _lines(self, file: DataFile) -> Iterator[str]:
        rows = self._rows("text", file, encoding=_encoding(_head(file)))
        for batch in rows.iter(batch_size=BATCH):
            yield from batch["text"]

    def _txt(self, file: DataFile) -> Iterator[Cell]:
        for line in self._lines(file):
            yield self._columns.bare(file.name, line)

    def _jsonl(self, file: DataFile) -> Iterator[Cell]:
        # The reader of `datasets` takes blocks of 10 MB, guesses types, and does not name the line
        # of an error.
        for number, line in enumerate(self._lines(file), start=1):
            if line.strip():
                yield _cell(f"{file.name}, line {number}", self._columns, line)

    def _json(self, file: DataFile) -> Iterator[Cell]:
        head = _head(file)
        if _encoding(head) != "utf-8-sig":
            raise DataError(f"{file.name} is UTF-16: convert it, with iconv -f utf-16 -t utf-8")
        lines = head.decode("utf-8-sig", errors="ignore").strip().split("\n")
        if not lines[0]:
            return
        if _is_json(lines[0]) and lines[0].startswith(("{", '"')):  # one object or string per line
            yield from self._jsonl(file)
            return
        rows = self._rows("json", file)
        try:
            for batch in rows.iter(batch_size=BATCH):
                yield from self._columns.pairs(batch, *self._columns.choose(file.name, batch))
        except TypeError as error:  # from datasets before 5.1, for a row that is no object
            raise DataError(_json_problem(file)) from error

    def _csv(self, file: DataFile) -> Iterator[Cell]:
        from datasets import Features, Value

        head = _head(file)
        encoding = _encoding(head)
        text = head.decode(encoding, errors="replace" if len(head) == HEAD_BYTES else "strict")
        delimiter = _delimiter(text, self._columns.candidates())
        rows = _table(text, delimiter)
        header, first = next(filter(None, rows), None), next(filter(any, rows), None)
        if header is None or (first is None and len(head) < HEAD_BYTES):
            return
        chosen = self._columns.choose(file.name, _distinct(header))
        if first is not None and any(cell.strip() for cell in first[len(header) :]):
            raise DataError(
                f"{file.name}: its first row has {len(first)} cells, its header {len(header)}: put "
                f"texts that hold '{delimiter}' in quotation marks"
            )
        # All cells are read as texts: no guessing of numbers, dates or null.
        rows = self._rows(
            "csv",
            file,
            sep=delimiter,
            encoding=encoding,
            features=Features({name: Value("string") for name in _distinct(header)}),
            index_col=False,
            na_filter=False,
        )
        yield from self._pairs(rows, *chosen)

    def _parquet(self, file: DataFile) -> Iterator[Cell]:
        names = plain_columns(self._rows("parquet", file))
        text, others = self._columns.choose(file.name, names)
        rows = self._rows("parquet", file, columns=[text, *others], batch_size=BATCH)
        yield from self._pairs(rows, text, others)

    def _arrow(self, file: DataFile) -> Iterator[Cell]:
        rows = self._rows("arrow", file)
        yield from self._pairs(rows, *self._columns.choose(file.name, plain_columns(rows)))


def plain_columns(rows: Any) -> list[str]:
    """Columns of a dataset without those that would have to be decoded: pictures, sound."""
    features = rows.features or {}
    return [
        name
        for name in rows.column_names or ()
        if not hasattr(features.get(name), "decode_example")
    ]


def _head(file: DataFile) -> bytes:
    with file.open() as opened:
        return bytes(opened.read(HEAD_BYTES))


def _encoding(head: bytes) -> str:
    return BYTE_ORDER_MARKS.get(head[:2], "utf-8-sig")


def _first_bad_byte(file: DataFile) -> int:
    """Position in the file: the library counts from the start of a chunk."""
    try:
        with file.open() as opened:
            opened.read().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _table(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=delimiter)


def _delimiter(text: str, columns: Sequence[str]) -> str:
    """The first delimiter that gives one of `columns`; else the one that gives most columns."""
    headers = {
        delimiter: next(filter(None, _table(text, delimiter)), []) for delimiter in DELIMITERS
    }
    for column in columns:
        for delimiter, header in headers.items():
            if column in header:
                return delimiter
    return max(DELIMITERS, key=lambda delimiter: len(headers[delimiter]))


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of columns made distinct as pandas does: a, a.1 ..."""
    found: dict[str, None] = {}
    for place, name in enumerate(names):
        base = unique = name or f"Unnamed: {place}"
        count = 0
        while unique in found:
            count += 1
            unique = f"{base}.{count}"
        found[unique] = None
    return list(found)


def _cell(place: str, columns: Columns, line: str) -> Cell:
    """The row in a line of JSON, which is an object or a text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place}: not JSON ({problem})") from error
    if isinstance(row, str):
        return columns.bare(place, row)
    if not isinstance(row, dict):
        raise DataError(f"{place}: an object or a string is needed")
    text, others = columns.choose(place, row)
    if row[text] is not None and not isinstance(row[text], (str, list)):
        raise DataError(f"{place}: '{text}' is not a text")
    return row[text], {name: row[name] for name in others}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_problem(file: DataFile) -> str:
    """Message for a JSON document that cannot be read as rows."""
    try:
        with file.open() as opened:
            json.loads(opened.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"{file.name}, line {error.lineno}: not JSON ({error.msg})"
    except (ValueError, RecursionError) as error:
        return f"{file.name}: not JSON ({first_line(error)})"
    return f"{file.name}: a list of objects or of strings is needed, or one of them a line"


def _parser_problem(problem: str) -> str:
    """A message of pandas about a table, without its technical terms."""
    problem = problem.removeprefix("Error tokenizing data. C error: ")
    if problem.startswith("EOF inside string"):
        return f"a quotation mark in row {problem.rpartition(' ')[2]} is never closed"
    if problem.startswith("Expected"):
        return f"{problem}: put texts that hold the delimiter in quotation marks"
    return problem
