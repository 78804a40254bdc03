"""Prompts: lengths of queries, valid and invalid files, the held-out split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from ppo_cli.config.schema import PromptsConfig
from ppo_cli.data.prompts import LengthSampler, Prompt, collate, load_prompts
from ppo_cli.errors import DataError
from tests.conftest import make_tokenizer
from tests.data.reading import read_texts

# ---------------------------------------------------------------- LengthSampler


def test_lengths_run_from_the_minimum_to_one_below_the_maximum_all_alike() -> None:
    sampler = LengthSampler(3, 8, seed=0)
    drawn = [sampler() for _ in range(5000)]
    assert all(type(length) is int for length in drawn)
    counts = np.bincount(drawn, minlength=10)
    assert counts[[0, 1, 2, 8, 9]].sum() == 0
    assert (np.abs(counts[3:8] - 1000) < 5 * np.sqrt(5000 * 0.2 * 0.8)).all()


def test_a_range_of_one_length_always_gives_it() -> None:
    assert {LengthSampler(5, 6)() for _ in range(10)} == {5}


def test_a_seed_gives_the_same_lengths_and_leaves_numpys_global_state_alone() -> None:
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    one, two = LengthSampler(2, 50, seed=7), LengthSampler(2, 50, seed=7)
    assert [one() for _ in range(20)] == [two() for _ in range(20)]
    other = LengthSampler(2, 50, seed=8)
    assert [one() for _ in range(20)] != [other() for _ in range(20)]
    assert np.random.rand() == expected


def test_without_a_seed_lengths_are_those_that_trl_draws_from_numpys_global_state() -> None:
    sampler = LengthSampler(2, 9)
    np.random.seed(3)
    drawn = [sampler() for _ in range(20)]
    np.random.seed(3)
    assert drawn == [np.random.choice(list(range(2, 9))) for _ in range(20)]


def test_a_sampler_goes_on_from_its_saved_state_which_is_plain_json() -> None:
    one, two = LengthSampler(2, 50, seed=1), LengthSampler(2, 50, seed=99)
    for _ in range(5):
        one()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [two() for _ in range(20)] == [one() for _ in range(20)]


@pytest.mark.parametrize(("low", "high"), [(8, 2), (4, 4), (-1, 3)])
def test_bounds_without_a_length_between_them_are_refused_by_number(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=rf"{high}.*{low}"):
        LengthSampler(low, high)


# ---------------------------------------------------------------- files

TEXTS = ["a fine film, truly", "schön & günstig", 'she said "no"', "last"]


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def csv_text(column: str = "text", newline: str = "\n") -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [f"id,{column}", *(f"{i},{text}" for i, text in enumerate(quoted))]
    return newline.join(rows) + newline


def jsonl_text(column: str = "text", newline: str = "\n") -> str:
    return newline.join(json.dumps({"id": 1, column: text}) for text in TEXTS) + newline


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "TXT"])
def test_text_files_are_read_whatever_their_line_ends_and_byte_order_mark(
    tmp_path: Path, ending: str, newline: str, bom: bytes
) -> None:
    content = {
        "txt": newline.join(TEXTS),
        "csv": csv_text(newline=newline),
        "jsonl": jsonl_text(newline=newline),
    }[ending.lower()]
    source = write(tmp_path / f"reviews.{ending}", bom + content.encode())
    assert read_texts(source) == TEXTS


def test_the_column_of_a_csv_is_found_behind_a_byte_order_mark(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "\ufefftext,id\nhello,1\n")
    assert read_texts(source) == ["hello"]


def test_a_csv_field_may_hold_line_breaks_and_be_very_long(tmp_path: Path) -> None:
    long = "word " * 50_000
    source = write(tmp_path / "a.csv", f'text\n"two\nlines"\n"{long}"\n')
    assert read_texts(source) == ["two\nlines", long]


def test_parquet_is_read_and_its_empty_cells_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"review": ["one", None, "", "two"], "label": [1, 0, 1, 0]}), path)
    assert read_texts(str(path), column="review") == ["one", "two"]


def test_blank_lines_are_left_out_and_lines_of_jsonl_may_be_bare_strings(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.txt", "one\n\n   \ntwo\n")) == ["one", "two"]
    assert read_texts(write(tmp_path / "a.jsonl", '"one"\n\n{"text": "two"}\n')) == ["one", "two"]


def test_only_texts_that_are_wanted_count_towards_the_limit(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "aa\nb\ncc\nd\nee\n")
    assert read_texts(source, min_characters=1, limit=2) == ["aa", "cc"]


def test_a_limit_stops_reading_before_what_follows_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nnot json\n')
    assert read_texts(source, limit=2) == ["one", "two"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_missing_column_is_named_with_the_nearest_one_and_the_option(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.table({"id": [1], "texts": ["x"]}), path)
    else:
        write(path, (csv_text if ending == "csv" else jsonl_text)("texts"))
    with pytest.raises(DataError) as error:
        read_texts(str(path), column="text")
    for part in (path.name, "'text'", "id, texts", "Did you mean 'texts'?", "prompts.text_column"):
        assert part in str(error.value)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["no rows", "no bytes"])
def test_a_file_without_texts_is_refused(tmp_path: Path, ending: str, kind: str) -> None:
    path = tmp_path / f"a.{ending}"
    write(path, "text\n" if ending == "csv" and kind == "no rows" else "")
    if ending == "parquet" and kind == "no rows":
        parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=path.name):
        read_texts(str(path))


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("before", [0, 30_000])
def test_another_encoding_is_refused_with_the_byte_that_shows_it(
    tmp_path: Path, ending: str, before: int
) -> None:
    start = b"text\n" + b"plain\n" * (before // 6) if ending != "jsonl" else b""
    if ending == "jsonl":
        start = b'{"text": "plain"}\n' * (before // 18) + b'{"text": "'
    data = start + "schön".encode("latin-1") + (b'"}\n' if ending == "jsonl" else b"\n")
    with pytest.raises(DataError) as error:
        read_texts(write(tmp_path / f"a.{ending}", data))
    assert f"byte {data.index(0xF6)} is not UTF-8" in str(error.value)
    assert "iconv" in str(error.value)


@pytest.mark.parametrize("line", ['{"text": "x"', "plain words", "{'text': 1}"])
def test_a_line_that_is_not_json_is_refused_by_number(tmp_path: Path, line: str) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not JSON"):
        read_texts(source)


@pytest.mark.parametrize(("line", "message"), [("[1]", "an object"), ('{"text": 5}', "not a text")])
def test_a_line_of_jsonl_that_holds_no_text_is_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(DataError, match=rf"line 1: .*{message}"):
        read_texts(write(tmp_path / "a.jsonl", line + "\n"))


def test_a_column_of_numbers_and_a_broken_parquet_file_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'text' holds int, not text"):
        read_texts(str(tmp_path / "a.parquet"))
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(DataError, match=r"b\.parquet is not a whole Parquet file"):
        read_texts(write(tmp_path / "b.parquet", whole[: len(whole) // 2]))


def test_absent_files_folders_and_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        read_texts(str(tmp_path / "gone.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv holds no data: a file ending in"):
        read_texts(str(tmp_path / "folder.csv"))
    with pytest.raises(DataError, match=r"a\.xlsx: a file ending in .*\.csv, .* is needed"):
        read_texts(write(tmp_path / "a.xlsx", "x"))


def test_a_quotation_mark_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv.*quotation mark in row 1 is never closed"):
        read_texts(write(tmp_path / "a.csv", 'text\n"never closed\nmore\n'))


# ---------------------------------------------------------------- load_prompts


def review_file(tmp_path: Path, count: int = 60, words: int = 20) -> str:
    """Texts of distinct words t(i), t(i+1), ...: the first word says which text it is."""
    lines = [" ".join(f"t{(i + k) % 79}" for k in range(words)) for i in range(count)]
    return write(tmp_path / "reviews.txt", "\n".join(lines))


def settings(source: str, **changes: Any) -> PromptsConfig:
    return PromptsConfig(source=source, **{"held_out": 10, **changes})


def first_words(prompts: list[Prompt]) -> set[int]:
    return {int(prompt.input_ids[0]) for prompt in prompts}


def test_held_out_texts_are_not_trained_on_and_none_is_lost(tmp_path: Path) -> None:
    prompts = load_prompts(settings(review_file(tmp_path)), make_tokenizer(), seed=0)
    train, held_out = first_words(prompts.train), first_words(prompts.held_out)
    assert len(prompts.held_out) == 10
    assert len(prompts.train) == 50
    assert train | held_out == set(range(60))
    assert not train & held_out


def test_queries_are_the_starts_of_their_texts_with_lengths_within_the_bounds(
    tmp_path: Path,
) -> None:
    prompts = load_prompts(
        settings(review_file(tmp_path), input_min_text_length=3, input_max_text_length=7),
        make_tokenizer(),
        seed=0,
    )
    everything = prompts.train + prompts.held_out
    lengths = {len(prompt.input_ids) for prompt in everything}
    assert lengths == {3, 4, 5, 6}
    for prompt in everything:
        start, length = int(prompt.input_ids[0]), len(prompt.input_ids)
        assert prompt.input_ids.dtype == torch.long
        assert prompt.input_ids.tolist() == [(start + k) % 79 for k in range(length)]
        assert prompt.query.split() == [f"t{i}" for i in prompt.input_ids.tolist()]


def test_a_text_shorter_than_the_length_drawn_is_used_whole(tmp_path: Path) -> None:
    source = review_file(tmp_path, words=2)
    prompts = load_prompts(settings(source, input_min_text_length=4), make_tokenizer(), seed=0)
    assert {len(prompt.input_ids) for prompt in prompts.train} == {2}


def test_the_seed_decides_split_and_lengths(tmp_path: Path) -> None:
    source = review_file(tmp_path)

    def ids(seed: int) -> list[list[int]]:
        prompts = load_prompts(settings(source), make_tokenizer(), seed)
        return [p.input_ids.tolist() for p in prompts.train + prompts.held_out]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert {row[0] for row in ids(1)[50:]} != {row[0] for row in ids(2)[50:]}


def test_only_texts_longer_than_min_characters_are_used(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "t1 t2\nt3 t4 t5\nt6 t7 t8 t9\n")
    prompts = load_prompts(settings(source, min_characters=8), make_tokenizer(), seed=0)
    assert first_words(prompts.train + prompts.held_out) == {6}
    with pytest.raises(DataError, match=r"longer than 50 characters.*prompts\.min_characters"):
        load_prompts(settings(source, min_characters=50), make_tokenizer(), seed=0)


@pytest.mark.parametrize(("limit", "held_out"), [(5, 10), (20, 10), (8, 40), (1000, 10)])
def test_no_more_texts_than_the_limit_are_trained_on(
    tmp_path: Path, limit: int, held_out: int
) -> None:
    prompts = load_prompts(
        settings(review_file(tmp_path), limit=limit, held_out=held_out), make_tokenizer(), seed=0
    )
    assert 0 < len(prompts.train) <= limit
    assert 0 < len(prompts.held_out) <= held_out
    assert not first_words(prompts.train) & first_words(prompts.held_out)


def test_few_texts_are_shared_between_training_and_holding_out(tmp_path: Path) -> None:
    prompts = load_prompts(
        settings(review_file(tmp_path, count=6), held_out=64), make_tokenizer(), seed=0
    )
    assert len(prompts.train) == 3
    assert len(prompts.held_out) == 3


def test_the_embedded_source_holds_out_reviews_that_it_does_not_train_on() -> None:
    # A tokenizer that gives each text tokens of its own would do; its lengths are all that counts.
    prompts = load_prompts(
        PromptsConfig(limit=40, held_out=12, input_min_text_length=3), make_tokenizer(), seed=0
    )
    assert len(prompts.train) == 40
    assert len(prompts.held_out) == 12


def test_the_collator_turns_rows_into_columns() -> None:
    rows = [{"query": "a", "input_ids": [1]}, {"query": "b", "input_ids": [2, 3]}]
    assert collate(rows) == {"query": ["a", "b"], "input_ids": [[1], [2, 3]]}
