"""Rows: filters, columns, conversations, held-out splits, several sources, hub datasets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from ppo_cli.config.prompts import PromptsConfig, PromptSource
from ppo_cli.data.prompts import load_held_out, load_prompts
from ppo_cli.data.rows import Row, read_rows
from ppo_cli.errors import DataError
from tests.conftest import make_chat_tokenizer, make_tokenizer


def file_of(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(source: str, **settings: Any) -> list[Row]:
    return read_rows(PromptSource(source=source, **settings))


def texts(rows: list[Row]) -> list[str]:
    return [row.text for row in rows]


# ---------------------------------------------------------------- filters and columns

TABLE = [
    {"text": "one", "label": 1, "lang": "en", "good": True},
    {"text": "two", "label": 0, "lang": "de", "good": False},
    {"text": "three", "label": 1, "lang": "fr", "good": False},
]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"label": 1}, ["one", "three"]),
        ({"lang": ["en", "de"]}, ["one", "two"]),
        ({"label": 1, "lang": ["fr", "de"]}, ["three"]),
        ({"good": False}, ["two", "three"]),
    ],
)
def test_only_rows_with_the_wanted_values_are_read(
    tmp_path: Path, ending: str, where: dict[str, Any], expected: list[str]
) -> None:
    path = tmp_path / f"a.{ending}"
    {
        "jsonl": lambda: file_of(path, TABLE),
        "csv": lambda: Dataset.from_list(TABLE).to_csv(path),
        "parquet": lambda: Dataset.from_list(TABLE).to_parquet(path),
    }[ending]()
    assert texts(read(str(path), where=where)) == expected


def test_a_filter_of_a_column_that_is_not_there_and_one_that_nothing_passes(tmp_path: Path) -> None:
    source = file_of(tmp_path / "a.jsonl", TABLE)
    with pytest.raises(DataError, match=r"no column 'lable'.*'label'.*prompts\.where"):
        read(source, where={"lable": 1})
    with pytest.raises(DataError, match=r"no texts that prompts\.where .*7.* accepts"):
        read(source, where={"label": 7})
    with pytest.raises(DataError, match=r"no column 'lang', only texts \(prompts\.where"):
        read(file_of(tmp_path / "b.jsonl", ["one"]), where={"lang": "en"})


def test_texts_have_to_be_longer_than_the_least_and_no_longer_than_the_most(tmp_path: Path) -> None:
    source = file_of(tmp_path / "a.jsonl", ["a", "ab", "abc", "abcd"])
    assert texts(read(source, min_characters=1, max_characters=3)) == ["ab", "abc"]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(None, {"label": 1, "lang": "en", "good": True}), (["lang"], {"lang": "en"}), ([], {})],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_columns_are_kept_for_rewards(
    tmp_path: Path, ending: str, keep: list[str] | None, expected: dict[str, Any]
) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        file_of(path, TABLE)
    else:
        Dataset.from_list(TABLE).to_parquet(path)
    settings = PromptsConfig(source=str(path), keep_columns=keep, held_out=1)
    prompts = load_prompts(settings, make_chat_tokenizer(), seed=0)
    found = {p.query: p.columns for p in prompts.train + prompts.held_out}
    assert {k: v for k, v in found.items() if "one".startswith(k)}.popitem()[1] == expected


def test_a_column_to_keep_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'x'.*prompts\.keep_columns"):
        read(file_of(tmp_path / "a.jsonl", TABLE), keep_columns=["x"])


# ---------------------------------------------------------------- conversations

ASKED = [{"role": "user", "content": "Hi"}]
SYSTEM = {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Hello!"}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": ASKED}, {}, ASKED),
    "its own system prompt": ({"messages": [SYSTEM, *ASKED]}, {"system": "x"}, [SYSTEM, *ASKED]),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": "So?"},
            ]
        },
        {},
        [*ASKED, ANSWER, {"role": "user", "content": "So?"}],
    ),
    "prompt and system columns": (
        {"prompt": "Hi", "sys": "Be kind."},
        {"system_column": "sys"},
        [SYSTEM, *ASKED],
    ),
    "a system prompt for all": ({"text": "Hi"}, {"system": "Be kind."}, [SYSTEM, *ASKED]),
    "a column by its name": ({"x": ASKED, "text": "no"}, {"text_column": "x"}, ASKED),
    "an answer at the end": ({"messages": [*ASKED, ANSWER]}, {}, ASKED),
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_come_in_several_forms(tmp_path: Path, form: str) -> None:
    cells, settings, expected = FORMS[form]
    source = file_of(tmp_path / "a.jsonl", [{**cells, "label": 1}])
    (row,) = read(source, chat=True, **settings)
    assert row.messages == expected
    assert row.text == expected[-1]["content"]
    assert row.columns["messages"] == expected and row.columns["label"] == 1
    assert row.columns.get("completion") == ("Hello!" if "answer" in form else None)


def test_conversations_are_read_from_parquet_and_without_a_question_left_out(
    tmp_path: Path,
) -> None:
    rows = [{"messages": ASKED}, {"messages": [SYSTEM]}, {"messages": [ANSWER]}, {"messages": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    found = read(str(tmp_path / "a.parquet"), chat=True, system="s")
    assert [row.messages[1:] for row in found if row.messages] == [ASKED]


@pytest.mark.parametrize(
    ("cell", "chat", "problem"),
    [
        ([{"role": "user"}], True, "message 1: a text is needed as role and as content"),
        ([{"role": "user", "content": [{"type": "image"}]}], True, "message 1: a text is needed"),
        (["Hi"], True, "message 1: an object"),
        (ASKED, False, "set prompts.chat to true"),
        ([1], False, "holds list, not text"),
    ],
)
def test_what_is_no_conversation_is_refused(
    tmp_path: Path, cell: Any, chat: bool, problem: str
) -> None:
    source = file_of(tmp_path / "a.jsonl", [{"messages": cell}])
    with pytest.raises(DataError, match=rf"a\.jsonl, text 1.*{problem}"):
        read(source, chat=chat)


# ---------------------------------------------------------------- held-out prompts and mixtures


def words(first: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{first} t{i}"} for i in range(count)]


def test_held_out_prompts_may_come_from_another_file_or_split(tmp_path: Path) -> None:
    here = file_of(tmp_path / "here.jsonl", words("t1", 20))
    there = file_of(tmp_path / "there.jsonl", words("t2", 9) + words("t1", 2))
    settings = PromptsConfig(source=here, held_out_source=there, held_out=20)
    prompts = load_prompts(settings, make_tokenizer(), 0)
    assert Counter(p.query.split()[0] for p in prompts.held_out) == {"t2": 9, "t1": 2}
    assert len(prompts.train) == 18  # two are held out
    assert load_held_out(settings, make_tokenizer(), 0)[0].query == prompts.held_out[0].query

    folder = tmp_path / "folder"
    folder.mkdir()
    file_of(folder / "train.jsonl", words("t3", 5))
    file_of(folder / "test.jsonl", words("t4", 5))
    settings = PromptsConfig(source=str(folder), held_out_split="test", held_out=3)
    prompts = load_prompts(settings, make_tokenizer(), 0)
    assert {p.query.split()[0] for p in prompts.held_out} == {"t4"}
    assert (len(prompts.train), len(prompts.held_out)) == (5, 3)
    with pytest.raises(DataError, match=r"held_out_split is test.*no splits.*held_out_source"):
        load_prompts(PromptsConfig(source=here, held_out_split="test"), make_tokenizer(), 0)


def mixture(tmp_path: Path, **settings: Any) -> PromptsConfig:
    one = file_of(tmp_path / "one.jsonl", words("t1", 40))
    two = file_of(tmp_path / "two.jsonl", [{"x": row["text"]} for row in words("t2", 16)])
    sources = [{"source": one, "weight": 3.0}, {"source": two, "text_column": "x"}]
    return PromptsConfig.model_validate({"sources": sources, "held_out": 8, **settings})


@pytest.mark.parametrize(
    ("limit", "expected"), [(20, {"t1": 15, "t2": 5}), (None, {"t1": 42, "t2": 14})]
)
def test_several_sources_are_mixed_by_their_weights(
    tmp_path: Path, limit: int | None, expected: dict[str, int]
) -> None:
    settings = mixture(tmp_path, limit=limit)
    prompts = load_prompts(settings, make_tokenizer(), 0)
    assert Counter(p.query.split()[0] for p in prompts.train) == expected
    assert Counter(p.query.split()[0] for p in prompts.held_out) == {"t1": 6, "t2": 2}
    trained = {p.query for p in prompts.train}
    assert not trained & {p.query for p in prompts.held_out}
    found = [p.input_ids.tolist() for p in load_held_out(settings, make_tokenizer(), 0)]
    assert found == [p.input_ids.tolist() for p in prompts.held_out]
    assert [p.query.split()[0] for p in prompts.held_out] != ["t1"] * 6 + ["t2"] * 2
    other = load_prompts(settings, make_tokenizer(), 1)
    assert {p.query for p in other.held_out} != {p.query for p in prompts.held_out}


# ---------------------------------------------------------------- hub datasets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of the library for a dataset of the hub; it answers with 40 rows and two labels."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": [f"t{i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    data = Dataset.from_dict(rows, features=features)
    calls: list[dict[str, Any]] = []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        calls.append({"name": name, **options})
        return data.to_iterable_dataset() if options["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("ppo_cli.utils.hub._ask_hub", lambda *_: True)
    return calls


def test_a_hub_dataset_is_loaded_at_its_revision(hub: list[dict[str, Any]]) -> None:
    assert len(read("owner/name", revision="v2")) == 40
    assert (hub[0]["revision"], hub[0]["streaming"]) == ("v2", False)


def test_labels_of_a_hub_dataset_may_be_given_by_their_names(hub: list[dict[str, Any]]) -> None:
    rows = read("owner/name", where={"label": ["pos"]})
    assert texts(rows) == [f"t{i}" for i in range(1, 40, 2)] and rows[0].columns == {"label": 1}
    with pytest.raises(DataError, match=r"no label 'poz'; it has neg, pos\. Did you mean 'pos'"):
        read("owner/name", where={"label": "poz"})


def test_a_stream_is_shuffled_in_its_buffer_by_the_seed(hub: list[dict[str, Any]]) -> None:
    def first(seed: int, buffer: int) -> list[str]:
        source = PromptSource(source="o/n", streaming=True, shuffle_buffer=buffer)
        return texts(read_rows(source, limit=10, seed=seed))

    assert first(0, 0) == [f"t{i}" for i in range(10)]
    assert first(0, 20) == first(0, 20) != first(1, 20)
    assert all(int(text[1:]) < 30 for text in first(0, 20))
    assert hub[0]["streaming"]


def test_keys_of_hub_datasets_are_refused_for_files(tmp_path: Path) -> None:
    source = file_of(tmp_path / "a.jsonl", TABLE)
    for key in ({"revision": "v2"}, {"streaming": True}):
        with pytest.raises(DataError, match=rf"prompts\.{next(iter(key))} is for hub datasets"):
            read(source, **key)
