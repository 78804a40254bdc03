"""Records of inputs: digests of files, places, commits of the hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError

from ppo_cli.config.loading import load_config
from ppo_cli.data import fingerprint
from ppo_cli.data.fingerprint import CLASSIFIER, POLICY, PROMPTS, Inputs, record_of

OLD, NEW = "a" * 40, "b" * 40


def make_model(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"config.json": "{}", "model.safetensors": "weights", **files}.items():
        (folder / name).write_text(text)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- files


def test_the_files_that_are_loaded_are_recorded_and_no_others(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", **{"code.py": "1", "vocab.txt": "a"})
    before = record_of(POLICY, str(folder))
    assert before is not None
    assert before["path"] == str(folder)
    assert before["files"] == {
        name: f"sha256 {sha256(folder / name)}"
        for name in ("code.py", "config.json", "model.safetensors", "vocab.txt")
    }
    for name in ("metrics.jsonl", "training.png", "README.md", ".hidden.json", "frontier.json"):
        (folder / name).write_text("of a run that lies in the same folder")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.json").write_text("{}")
    assert record_of(POLICY, str(folder)) == before


def test_of_large_files_size_and_pieces_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "MAX_HASHED_WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "PIECE", 8)
    path = tmp_path / "model.safetensors"
    content = bytes(i * i % 251 for i in range(1501))

    def digest(content: bytes) -> str:
        path.write_bytes(content)
        record = record_of(POLICY, str(tmp_path))
        assert record is not None
        return str(record["files"]["model.safetensors"])

    before = digest(content)
    assert before.startswith("1501 bytes, in pieces sha256 ")
    starts = [i * (1501 - 8) // 15 for i in range(16)]
    assert starts[0] == 0 and starts[-1] + 8 == 1501
    looked_at = {start + i for start in starts for i in range(8)}
    for place in range(0, 1501, 7):
        changed = bytearray(content)
        changed[place] ^= 1
        assert (digest(bytes(changed)) != before) == (place in looked_at)
    assert digest(content[:-1]) != before
    assert digest(content[:1000]) == f"sha256 {hashlib.sha256(content[:1000]).hexdigest()}"


@pytest.mark.parametrize("source", ["texts", "texts/*.txt", "texts/a.txt"])
def test_prompts_may_be_a_file_a_folder_or_a_pattern(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("texts/a.txt", "texts/b.txt", "texts/inner/c.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    record = record_of(PROMPTS, source)
    assert record is not None
    expected = {
        "texts": ["a.txt", "b.txt", "inner/c.csv"],
        "texts/*.txt": ["a.txt", "b.txt"],
        "texts/a.txt": ["a.txt"],
    }[source]
    assert sorted(record["files"]) == expected
    monkeypatch.chdir("/")
    assert Inputs({PROMPTS: record}).find(PROMPTS, source).name == str(tmp_path / source)
    (tmp_path / "texts" / "a.txt").write_text("other")
    (change,) = Inputs({PROMPTS: record}).find(PROMPTS, source).changes
    assert change.startswith(f"{PROMPTS} {source}: a.txt has changed (sha256 ")


def test_many_files_are_recorded_together(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text(str(number))
    record = record_of(PROMPTS, str(tmp_path))
    assert record is not None
    assert list(record["files"]) == ["300 files"]
    (tmp_path / "7.txt").write_text("8")
    (change,) = Inputs({PROMPTS: record}).find(PROMPTS, str(tmp_path)).changes
    assert "300 files has changed" in change


def test_what_is_embedded_is_known_by_its_contents() -> None:
    records = Inputs.of(load_config("tiny")).records
    assert list(records) == [POLICY, CLASSIFIER, PROMPTS]
    for record in records.values():
        assert record["name"] == "embedded"
        assert record["files"]
        assert "path" not in record
    assert records[POLICY]["files"] != records[CLASSIFIER]["files"]


# ---------------------------------------------------------------- finding


def test_of_two_places_the_one_that_is_as_recorded_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_model(there / "org" / "model")
    here.mkdir()
    monkeypatch.chdir(there)
    inputs = Inputs({POLICY: record_of(POLICY, "org/model")})
    assert inputs.find(POLICY, "org/model").name == "org/model"
    monkeypatch.chdir(here)  # where the name could be a hub id as well
    found = inputs.find(POLICY, "org/model")
    assert (found.name, found.changes) == (str(there / "org/model"), [])
    assert found.record is not None
    assert found.record["name"] == "org/model"
    make_model(here / "org" / "model", **{"config.json": "other"})
    assert inputs.find(POLICY, "org/model") == found
    make_model(here / "org" / "model")
    assert inputs.find(POLICY, "org/model").name == "org/model"
    (there / "org" / "model" / "model.safetensors").write_text("other")
    (here / "org" / "model" / "new.json").write_text("{}")
    found = inputs.find(POLICY, "org/model")
    assert found.name == str(there / "org" / "model")  # what the run was made from
    assert "model.safetensors has changed" in found.changes[0]


def test_each_change_is_named_with_what_it_was(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", **{f"{i}.json": "" for i in range(9)})
    inputs = Inputs({POLICY: record_of(POLICY, str(folder))})
    was = sha256(folder / "config.json")[:12]
    (folder / "config.json").write_text("[]")
    (folder / "model.safetensors").unlink()
    (folder / "extra.json").write_text("{}")
    (change,) = inputs.find(POLICY, str(folder)).changes
    now = sha256(folder / "config.json")[:12]
    for part in (
        f"config.json has changed (sha256 {was}, now sha256 {now})",
        "model.safetensors is gone",
        "extra.json is new",
    ):
        assert part in change
    for i in range(9):
        (folder / f"{i}.json").write_text("1")
    assert " and 9 more" in inputs.find(POLICY, str(folder)).changes[0]


def test_the_base_of_an_adapter_belongs_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({"base_model_name_or_path": "base"}))
    inputs = Inputs({POLICY: record_of(POLICY, "adapter")})
    assert inputs.find(POLICY, "adapter").changes == []
    (tmp_path / "base" / "config.json").write_text("[]")
    (change,) = inputs.find(POLICY, "adapter").changes
    assert f"{POLICY} adapter: its base model base: config.json has changed" in change
    (tmp_path / "base").rename(tmp_path / "gone")
    (change,) = inputs.find(POLICY, "adapter").changes
    assert f"its base model base is not there (it was {tmp_path / 'base'})" in change
    settings.write_text(json.dumps({"base_model_name_or_path": "gone"}))
    assert "is an adapter of gone, was of base" in inputs.find(POLICY, "adapter").changes[1]


def test_a_path_that_is_no_text_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "\udcff"
    make_model(odd / "model")
    monkeypatch.chdir(odd)
    record = record_of(POLICY, "./model")
    assert record is not None
    assert "path" not in record
    json.dumps(record, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "records",
    [None, 3, [], {POLICY: None}, {POLICY: []}, {POLICY: {}}, {POLICY: {"name": "x", "files": 3}}],
)
def test_damaged_records_are_as_good_as_none(records: Any) -> None:
    assert Inputs(records).find(POLICY, "embedded").changes == []


# ---------------------------------------------------------------- the hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds commit `OLD` of model and dataset `org/x`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for kind in ("models", "datasets"):
        folder = tmp_path / f"{kind}--org--x"
        (folder / "snapshots" / OLD).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(OLD)
    return tmp_path


def answer(monkeypatch: pytest.MonkeyPatch, *known: str) -> None:
    """The hub has these commits, the last of which is its newest."""

    def repo_info(self: Any, name: str, *, revision: str | None = None, **_: Any) -> Any:
        if revision is not None and revision not in known:
            response: Any = type("Response", (), {"headers": {}, "request": None})()
            raise RevisionNotFoundError("404", response=response)
        return type("Info", (), {"sha": revision or known[-1]})()

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)


def test_a_hub_model_goes_on_from_its_commit_whatever_the_hub_has_by_now(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("tiny", assignments=["policy.model=org/x", "reward.model=org/x"])
    inputs = Inputs.of(config)
    assert inputs.records[POLICY] == {"name": "org/x", "commit": OLD}
    answer(monkeypatch, OLD, NEW)
    located, changes, found = inputs.locate(config)
    assert (located.policy.revision, located.reward.revision) == (OLD, OLD)
    assert changes == []
    assert found.records == inputs.records
    # Another machine, whose cache is empty, and a hub that no longer has the commit.
    (cache / "models--org--x" / "snapshots" / OLD).rmdir()
    assert inputs.find(POLICY, "org/x").revision == OLD
    answer(monkeypatch, NEW)
    gone = inputs.find(POLICY, "org/x")
    assert gone.revision is None
    assert f"{POLICY} org/x: the hub no longer has its commit {OLD[:12]}" in gone.changes[0]
    assert gone.record == {"name": "org/x", "commit": NEW}


def test_another_revision_is_another_model_unless_it_is_the_same_commit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs({POLICY: {"name": "org/x", "commit": OLD}})
    answer(monkeypatch, NEW, OLD)
    assert inputs.find(POLICY, "org/x", OLD).changes == []
    (change,) = inputs.find(POLICY, "org/x", NEW).changes
    assert change == f"{POLICY} org/x was commit {OLD[:12]}, now commit {NEW[:12]}"


def test_a_folder_with_the_name_of_a_hub_model_is_not_taken_for_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs({POLICY: {"name": "org/x", "commit": OLD}})
    make_model(tmp_path / "org" / "x")
    monkeypatch.chdir(tmp_path)
    (change,) = inputs.find(POLICY, "org/x").changes
    here = tmp_path / "org" / "x"
    assert change == f"{POLICY} org/x was commit {OLD[:12]}, now the files of {here}"


def test_a_hub_dataset_that_has_moved_on_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, OLD)
    record = record_of(PROMPTS, "org/x")
    assert record == {"name": "org/x", "commit": OLD}
    inputs = Inputs({PROMPTS: record})
    assert inputs.find(PROMPTS, "org/x").changes == []
    answer(monkeypatch, OLD, NEW)
    (change,) = inputs.find(PROMPTS, "org/x").changes
    assert change == f"{PROMPTS} org/x was commit {OLD[:12]}, now commit {NEW[:12]}"


def test_a_hub_dataset_with_a_revision_is_loaded_at_its_commit_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["prompts.source=org/x", "prompts.revision=main"]
    config = load_config("tiny", assignments=named)
    answer(monkeypatch, OLD)
    inputs = Inputs.of(config)
    assert inputs.records[PROMPTS] == {"name": "org/x", "revision": "main", "commit": OLD}
    answer(monkeypatch, OLD, NEW)
    located, changes, found = inputs.locate(config)
    assert (located.prompts.revision, changes) == (OLD, [])
    assert found.records[PROMPTS] == inputs.records[PROMPTS]
    answer(monkeypatch, NEW)
    (cache / "datasets--org--x" / "snapshots" / OLD).rmdir()
    _, (change,), _ = inputs.locate(config)
    assert change == f"{PROMPTS} org/x: the hub no longer has its commit {OLD[:12]}"


def test_every_source_of_prompts_is_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    sources = "[{source: a.txt}, {source: b.txt, held_out_source: c.txt}]"
    config = load_config("tiny", assignments=[f"prompts.sources={sources}"])
    monkeypatch.chdir(tmp_path)
    inputs = Inputs.of(config)
    keys = ["sources.0.source", "sources.1.source", "sources.1.held_out_source"]
    assert list(inputs.records)[2:] == [f"prompts.{key}" for key in keys]
    monkeypatch.chdir("/")
    located, changes, _ = inputs.locate(config)
    assert changes == []
    assert located.prompts.name == f"{tmp_path}/a.txt, {tmp_path}/b.txt"
    assert located.prompts.mixture[1].held_out_source == f"{tmp_path}/c.txt"
    (tmp_path / "c.txt").write_text("other")
    (change,) = inputs.locate(config)[1]
    assert "c.txt has changed" in change


def test_without_an_answer_nothing_is_said_of_what_cannot_be_known(cache: Path) -> None:
    inputs = Inputs({PROMPTS: {"name": "org/y", "commit": NEW}})  # tests are offline
    assert inputs.find(PROMPTS, "org/y").changes == []
    assert record_of(POLICY, "org/y") is None


# ---------------------------------------------------------------- code and machine
