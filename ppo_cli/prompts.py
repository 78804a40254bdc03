"""Where queries come from: texts, cut to their first tokens."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppo_cli.errors import DataError, PPOCliError, did_you_mean
from ppo_cli.hub import is_path, loading_errors
from ppo_cli.runtime import numpy_state, set_numpy_state

EMBEDDED = "embedded"
EMBEDDED_REVIEWS = 4000
MOST_EMBEDDED_REVIEWS = 100_000
FILE_ENDINGS = (".csv", ".jsonl", ".parquet", ".txt")


class LengthSampler:
    """Draws an integer from `min_value` to `max_value - 1`, all alike, as TRL's does.

    Args:
        min_value: smallest length.
        max_value: one more than the largest.
        seed: gives the sampler random numbers of its own; None draws from NumPy's global state.

    Raises:
        ValueError: there is no length to draw.
    """

    def __init__(self, min_value: int, max_value: int, seed: int | None = None) -> None:
        if not 0 <= min_value < max_value:
            raise ValueError(
                f"LengthSampler draws from {min_value} to {max_value - 1}: max_value ({max_value}) "
                f"must exceed min_value ({min_value})"
            )
        self.values = list(range(min_value, max_value))
        self._own = None if seed is None else np.random.RandomState(seed)

    def __call__(self) -> int:
        """One length."""
        choice: Callable[[list[int]], Any] = (self._own or np.random).choice
        return int(choice(self.values))

    def state_dict(self) -> dict[str, Any]:
        """The state of its own random numbers, plain values."""
        return {} if self._own is None else numpy_state(self._own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if self._own is not None and state:
            set_numpy_state(self._own, state)


@dataclass(frozen=True)
class Prompt:
    """A query as text and as tokens: `input_ids` (query_length,) int64."""

    query: str
    input_ids: Any


@dataclass(frozen=True)
class PromptSet:
    """Queries to train on, and others kept apart to evaluate on."""

    train: list[Prompt]
    held_out: list[Prompt]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows -> one list a column; what `PPOTrainer` wants of a dataset with ragged queries."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def load_prompts(settings: Any, tokenizer: Any, seed: int) -> PromptSet:
    """Read the source, keep texts long enough, hold some out, cut all to their first tokens.

    Args:
        settings: a `PromptsConfig`.
        tokenizer: the policy's.
        seed: decides which texts are held out and how long each query is.

    Raises:
        DataError: the source is absent, unreadable, without its column, or yields no query.
    """
    wanted = settings.limit and settings.limit + settings.held_out
    if settings.source == EMBEDDED:
        train, held_out = _embedded_texts(settings)
    else:
        texts = read_texts(
            settings.source,
            column=settings.text_column,
            subset=settings.subset,
            split=settings.split,
            keep=lambda text: len(text) > settings.min_characters,
            limit=wanted,
        )
        texts = list(dict.fromkeys(texts))  # what is held out is not trained on
        if not texts:
            raise DataError(
                f"{settings.source}: no text is longer than {settings.min_characters} characters; "
                "lower prompts.min_characters"
            )
        held_out_size = min(settings.held_out, len(texts) // 2)
        order = np.random.RandomState(seed).permutation(len(texts))
        held_out = [texts[i] for i in order[:held_out_size]]
        train = [texts[i] for i in order[held_out_size:]][: settings.limit]
    lengths = LengthSampler(
        settings.input_min_text_length, settings.input_max_text_length, seed=seed
    )
    prompts = PromptSet(
        train=list(_cut(train, tokenizer, lengths)),
        held_out=list(_cut(held_out, tokenizer, lengths)),
    )
    if not prompts.train:
        raise DataError(f"{settings.source}: no text yields a query")
    return prompts


def _embedded_texts(settings: Any) -> tuple[list[str], list[str]]:
    from ppo_cli.embedded import HELD_OUT_SEED, TRAIN_SEED
    from ppo_cli.embedded.grammar import reviews

    count = min(settings.limit or EMBEDDED_REVIEWS, MOST_EMBEDDED_REVIEWS)
    return (
        [review.text for review in reviews(count, TRAIN_SEED)],
        [review.text for review in reviews(settings.held_out, HELD_OUT_SEED)],
    )


def _cut(texts: Iterable[str], tokenizer: Any, lengths: LengthSampler) -> Iterator[Prompt]:
    import torch

    texts = list(texts)
    # The start of a text is enough: no tokenizer spends more than 32 characters a token on prose.
    most = 32 * lengths.values[-1]
    encoded = tokenizer([text[:most] for text in texts]).input_ids if texts else []
    for ids in encoded:
        if kept := ids[: lengths()]:
            yield Prompt(tokenizer.decode(kept), torch.tensor(kept, dtype=torch.long))


def read_texts(
    source: str,
    *,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    keep: Callable[[str], bool] = bool,
    limit: int | None = None,
) -> list[str]:
    """The texts of a file or a hub dataset that `keep` accepts, at most `limit` of them.

    Args:
        source: a `.txt` (one a line), `.csv`, `.jsonl` or `.parquet` file, or a dataset's hub id.
        column: the column that holds the text; `.txt` files have none.
        subset, split: of a hub dataset.

    Raises:
        DataError: absent, unreadable, empty, in another encoding than UTF-8, or without `column`.
    """
    path = Path(source)
    if path.suffix.lower() in FILE_ENDINGS or is_path(source):
        texts: Iterable[str] = _read_file(path, column)
    else:
        texts = _read_hub(source, column, subset, split)
    kept: list[str] = []
    seen_any = False
    for number, text in enumerate(texts, start=1):
        seen_any = True
        check_encodable(text, f"{source}, text {number}")
        if keep(text):
            kept.append(text)
            if limit and len(kept) >= limit:
                break
    if not seen_any:
        raise DataError(f"{source} holds no texts: it is empty")
    return kept


def check_encodable(text: str, place: str) -> None:
    """Raise `DataError` for halves of surrogate pairs, which stand for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start + 1} ({text[error.start]!r}) is no text: it must be "
            "UTF-8"
        ) from error


def _read_file(path: Path, column: str) -> Iterator[str]:
    if not os.path.exists(path):
        raise DataError(
            f"{path}: no such file; give one ending in {', '.join(FILE_ENDINGS)}, or the hub id of "
            "a dataset"
        )
    readers = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_jsonl}
    ending = path.suffix.lower()
    if not path.is_file() or ending not in FILE_ENDINGS:
        raise DataError(f"{path}: a file ending in {', '.join(FILE_ENDINGS)} is needed")
    try:
        if ending == ".parquet":
            yield from _read_parquet(path, column)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from readers[ending](file, path, column)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {_first_bad_byte(path)} is not UTF-8; convert the file, for example "
            "with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _first_bad_byte(path: Path) -> int:
    """The reader decodes in chunks and counts from the start of one."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _read_lines(file: Iterable[str], path: Path, column: str) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file if line.strip())


def _read_csv(file: Iterable[str], path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file)
    try:
        if rows.fieldnames is None:
            return
        _need_column(path, column, rows.fieldnames)
        for row in rows:
            if row[column]:
                yield row[column]
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from error


def _read_jsonl(file: Iterable[str], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}, line {number}: not JSON ({problem})") from error
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: an object or a string is needed")
        _need_column(f"{path}, line {number}", column, row)
        if not isinstance(row[column], str):
            raise DataError(f"{path}, line {number}: '{column}' is not a text")
        yield row[column]


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _need_column(path, column, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[column]):
            yield from _only_texts(path, column, batch.column(0).to_pylist())
    except MemoryError as error:
        raise PPOCliError(
            f"{path}: out of memory while it was read: give a smaller file, or one whose texts are "
            "shorter"
        ) from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from error


def _read_hub(name: str, column: str, subset: str | None, split: str) -> Iterator[str]:
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
    for batch in data.select_columns([column]).iter(batch_size=1000):
        yield from _only_texts(name, column, batch[column])


def _only_texts(source: Any, column: str, values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if value is not None and not isinstance(value, str):
            raise DataError(f"{source}: column '{column}' holds {type(value).__name__}, not text")
        if value:
            yield value


def _need_column(source: Any, column: str, names: Iterable[str]) -> None:
    names = list(names)
    if column not in names:
        raise DataError(
            f"{source}: no column '{column}'; it has {', '.join(names)}."
            f"{did_you_mean(column, names)} (set prompts.text_column)"
        )
