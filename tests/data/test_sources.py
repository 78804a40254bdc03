"""Texts from files of every kind, folders, archives, patterns, addresses; no files left behind."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from ppo_cli.data.readers import BATCH
from ppo_cli.data.sources import source_files
from ppo_cli.errors import DataError
from tests.data.reading import read_texts
from tests.test_cli import environment

TEXTS = [
    "a fine film, truly",
    "schön; günstig",
    'she said "no"',
    "null",
    "NaN",
    "007",
    "2020-01-01",
]


def table(delimiter: str = ",") -> str:
    rows = ['"{}"'.format(text.replace('"', '""')) for text in TEXTS]
    return "\n".join(
        [f"id{delimiter}text", *(f"{i}{delimiter}{row}" for i, row in enumerate(rows))]
    )


def lines() -> str:
    return "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_feather(path: Path) -> None:
    with pa.ipc.new_file(str(path), pa.schema({"text": pa.string()})) as file:
        file.write(pa.table({"text": TEXTS}))


FILES: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda path: write(path, table()),
    "semicolons.csv": lambda path: write(path, table(";")),
    "tabs.csv": lambda path: write(path, table("\t")),
    "a.tsv": lambda path: write(path, table("\t")),
    "utf16.csv": lambda path: write(path, table("\t").encode("utf-16")),
    "big-endian.csv": lambda path: write(path, b"\xfe\xff" + table().encode("utf-16-be")),
    "utf16.txt": lambda path: write(path, "\r\n".join(TEXTS).encode("utf-16")),
    "utf16.jsonl": lambda path: write(path, lines().encode("utf-16")),
    "carriage.csv": lambda path: write(path, table().replace("\n", "\r")),
    "shut.csv": lambda path: write(path, "\n\n" + table() + "\n\n"),
    "odd [1]*.csv": lambda path: write(path, table()),
    "a.ndjson": lambda path: write(path, lines()),
    "lines.json": lambda path: write(path, lines()),
    "objects.json": lambda path: write(path, json.dumps([{"text": t} for t in TEXTS], indent=1)),
    "strings.json": lambda path: write(path, json.dumps(TEXTS)),
    "a.parquet": lambda path: parquet.write_table(pa.table({"text": TEXTS}), path),
    "large.parquet": lambda path: parquet.write_table(
        pa.table({"text": pa.array(TEXTS, pa.large_string()).dictionary_encode()}), path
    ),
    "a.arrow": write_feather,
    "a.csv.gz": lambda path: write(path, gzip.compress(table(";").encode())),
    "a.jsonl.bz2": lambda path: write(path, bz2.compress(lines().encode())),
    "a.txt.xz": lambda path: write(path, lzma.compress("\n".join(TEXTS).encode())),
    "saved": lambda path: Dataset.from_dict({"text": TEXTS}).save_to_disk(path),
    "several": lambda path: DatasetDict(
        train=Dataset.from_dict({"text": TEXTS}), unseen=Dataset.from_dict({"text": ["other"]})
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", FILES)
def test_texts_come_out_as_they_went_in(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    assert read_texts(str(tmp_path / name)) == TEXTS


def test_an_archive_is_read_like_a_folder_of_its_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inner/2.jsonl", lines())
        archive.writestr("1.csv", table(";"))
        archive.writestr("__MACOSX/1.csv", b"\0\5\7")
    assert read_texts(str(tmp_path / "a.zip")) == TEXTS * 2
    assert source_files(str(tmp_path / "a.zip")) == [tmp_path / "a.zip"]


def test_rows_without_text_are_left_out_in_every_kind_of_file(tmp_path: Path) -> None:
    cells = ["one", None, "", "  \t", "two"]
    parquet.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": cell}) for cell in cells))
    write(tmp_path / "a.json", json.dumps([{"text": cell} for cell in cells], indent=1))
    write(tmp_path / "a.csv", "\n".join(["text,id", *(f"{cell or ''},1" for cell in cells)]))
    write(tmp_path / "short.csv", "id,text\n1,one\n2\n3,two\n")
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv", "short.csv"):
        assert read_texts(str(tmp_path / name)) == ["one", "two"], name


def test_a_pattern_takes_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", '"three"\n')
    write(tmp_path / "a.jsonl", '"one"\n"two"\n')
    write(tmp_path / "deep" / "c.jsonl", '"four"\n')
    assert read_texts(f"{tmp_path}/*.jsonl") == ["one", "two", "three"]
    assert read_texts(f"{tmp_path}/**/*.jsonl") == ["one", "two", "three", "four"]
    write(tmp_path / "c.jsonl", "{")
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: not JSON"):
        read_texts(f"{tmp_path}/*.jsonl")
    assert source_files(f"{tmp_path}/?.jsonl") == [tmp_path / f"{n}.jsonl" for n in "abc"]


def test_a_folder_has_splits_by_the_names_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "train-0.csv", "text\none\n")
    write(tmp_path / "train-1.csv", "text\ntwo\n")
    write(tmp_path / "test.csv", "text\nthree\n")
    write(tmp_path / "notes.txt", "not read\n")
    with pytest.warns(UserWarning, match=r"ending in \.txt are not read"):
        assert read_texts(str(tmp_path)) == ["one", "two"]
    with pytest.warns(UserWarning, match="not read"):
        assert read_texts(str(tmp_path), split="test") == ["three"]
    assert source_files(str(tmp_path), split="test") == [tmp_path / "test.csv"]
    with pytest.raises(
        DataError, match=r"no split 'tset'; it has test, train\. Did you mean 'test'"
    ):
        read_texts(str(tmp_path), split="tset")


def test_a_saved_dictionary_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    FILES["several"](tmp_path / "several")
    assert read_texts(str(tmp_path / "several"), split="unseen") == ["other"]
    with pytest.raises(DataError, match="it has train, unseen"):
        read_texts(str(tmp_path / "several"), split="test")


def test_the_readme_of_a_folder_names_subsets(tmp_path: Path) -> None:
    configs = "- config_name: {}\n  data_files: {}\n"
    listed = configs.format("one", "1.csv") + configs.format("two", "2.csv")
    write(tmp_path / "README.md", f"---\nconfigs:\n{listed}---\n")
    write(tmp_path / "1.csv", "text\none\n")
    write(tmp_path / "2.csv", "text\ntwo\n")
    assert read_texts(str(tmp_path), subset="two") == ["two"]
    with pytest.raises(DataError, match=r"one.*two"):
        read_texts(str(tmp_path))


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "one\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_texts("~/a.txt") == ["one"]
    assert source_files("~/a.txt") == [tmp_path / "a.txt"]


@pytest.mark.parametrize("source", ["embedded", "owner/name", "https://example.com/a.csv"])
def test_what_is_not_here_has_no_files(source: str) -> None:
    assert source_files(source) == []


def test_repeats_count_towards_a_limit_and_are_left_out(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.txt", "one\none\ntwo\nthree\n"))
    assert read_texts(source, limit=3) == ["one", "one", "two"]
    assert read_texts(source, limit=3, distinct=True) == ["one", "two"]


@pytest.mark.parametrize("ending", ["csv", "txt", "jsonl", "parquet"])
def test_a_file_of_many_batches_is_read_whole_and_in_order(tmp_path: Path, ending: str) -> None:
    texts = [f"text {i}" for i in range(40 * BATCH + 7)]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    elif ending == "jsonl":
        write(path, "\n".join(json.dumps({"text": text}) for text in texts))
    else:
        write(path, "\n".join(["text"] * (ending == "csv") + texts))
    assert read_texts(str(path)) == texts


def test_a_change_of_a_file_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\none\n")
    before = path.stat()
    assert read_texts(str(path)) == ["one"]
    write(path, "text\ntwo\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_texts(str(path)) == ["two"]


@pytest.mark.filterwarnings("ignore:Length of header")
def test_cells_that_the_header_has_no_place_for_are_not_dropped(tmp_path: Path) -> None:
    assert read_texts(str(write(tmp_path / "a.csv", "text,id,\none,1,\n"))) == ["one"]
    assert read_texts(str(write(tmp_path / "b.csv", "text,id\none,1,\n"))) == ["one"]
    with pytest.raises(DataError, match=r"c\.csv: its first row has 2 cells, its header 1"):
        read_texts(str(write(tmp_path / "c.csv", "text\none, two\n")))
    with pytest.raises(DataError, match=r"d\.csv.*line 3"):
        read_texts(str(write(tmp_path / "d.csv", "text\none\none, two\n")))


def test_too_much_text_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": TEXTS}), path)
    for error in (pa.ArrowMemoryError("malloc failed"), pa.lib.ArrowCapacityError("too large")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("datasets.load_dataset", fail)
        with pytest.raises(DataError, match=r"a\.parquet holds more text than there is memory for"):
            read_texts(str(path))


class _Server(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """An address under which the files of `tmp_path` are."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_files_are_read_from_addresses(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    write(tmp_path / "a.csv.gz", gzip.compress(table(";").encode()))
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", table())
    for name in ("a.csv.gz?download=true", "a.parquet", "a.zip"):
        assert read_texts(f"{served}/{name}") == TEXTS
    with pytest.raises(DataError, match=r"gone\.csv cannot be fetched: .*404") as error:
        read_texts(f"{served}/gone.csv?key=hush".replace("//", "//me:secret@"))
    assert "hush" not in str(error.value) and "secret" not in str(error.value)
    write(tmp_path / "b.csv", "review\none\n")
    with pytest.raises(DataError, match=rf"{served}/b\.csv: no column 'text'; it has review"):
        read_texts(f"{served}/b.csv")


def test_reading_leaves_nothing_behind_and_needs_no_home(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\none\n")
    (tmp_path / "scratch").mkdir()
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "from ppo_cli.config.prompts import PromptSource\n"
        "from ppo_cli.data.rows import read_rows\n"
        "from ppo_cli.data.sources import source_files\n"
        f"source = PromptSource(source={str(tmp_path / 'a.csv')!r})\n"
        "assert [row.text for row in read_rows(source, limit=1)] == ['one']\n"
        f"assert source_files({str(tmp_path)!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(HF_HOME=str(home / "hf"), HOME=str(home), TMPDIR=str(tmp_path / "scratch")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(home.rglob("*")) == []
    assert list((tmp_path / "scratch").rglob("*")) == []


EMBEDDED = """
from ppo_cli.config.schema import PromptsConfig
from ppo_cli.data.prompts import load_prompts
from ppo_cli.models.loading import load_tokenizer
assert load_prompts(PromptsConfig(limit=10), load_tokenizer("embedded"), 0).train
"""


@pytest.mark.parametrize("arguments", ["config", "stats none", "--help", None])
def test_the_library_is_imported_for_files_alone(arguments: str | None, tmp_path: Path) -> None:
    command = f"""
sys.argv = 'ppo-cli {arguments}'.split()
from ppo_cli.cli.app import main
try: main()
except SystemExit: pass
"""
    check = (
        f"import sys\n{command if arguments else EMBEDDED}\nassert 'datasets' not in sys.modules"
    )
    env = environment(HF_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
