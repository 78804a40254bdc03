"""Only files that a run wrote are replaced; nothing is read or written in other places."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_cli.cli.console import check_output, check_outputs
from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import PolicyConfig, RunConfig
from ppo_cli.data.embedded import policy_folder
from ppo_cli.data.fingerprint import inputs_of
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.models.loading import load_policy, load_tokenizer
from ppo_cli.models.saving import save_folder
from ppo_cli.rewards.sentiment import SentimentReward
from ppo_cli.training.checkpoint import prune, save_checkpoint
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils.inventory import Inventory
from tests import faults
from tests.conftest import SMALL_RUN, make_gpt2, make_policy, make_tokenizer
from tests.forked import Done, ppo_cli, start
from tests.test_bad_input import snapshot

TRAIN = [
    "train", "--config", SMALL_RUN, "--quiet", "--output", "run", "--steps", 2,
    "--set", "run.checkpoint_every=1", "--set", "run.best_of_n=[1,2]", "--set", "run.eval_every=1",
    "--set", "rollout.output_min_length=4", "--set", "rollout.output_max_length=8",
]  # fmt: skip
# Every file of such a run.
LISTED = {
    "README.md", "config.json", "frontier.json", "frontier.png", "generation_config.json",
    "metrics.jsonl", "model.safetensors", "run.yaml", "samples.jsonl", "tokenizer.json",
    "tokenizer_config.json", "training.png", "value_head.safetensors",
}  # fmt: skip
STEP = "checkpoints/step-000002"
CHECKPOINT = [
    f"{STEP}/{name}.{kind}"
    for name, kind in [
        ("weights", "safetensors"), ("tensors", "safetensors"), ("state", "json"),
        ("manifest", "json"),
    ]
]  # fmt: skip
FILES = sorted({*LISTED, "ppo-cli.json", *CHECKPOINT, "checkpoints/.lock"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file that a run can have. Tests do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    for arguments in (TRAIN, ["plot", "run", "--frontier"]):
        done = ppo_cli(*arguments, cwd=folder)
        assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(params=["", "old"])
def run(
    request: pytest.FixtureRequest,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> RunDirectory:
    """A copy called `run` in the working folder; also without a list, as in older releases."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    if request.param == "old":
        Path("run/ppo-cli.json").unlink()
    return RunDirectory("run")


LISTED_RUN = pytest.mark.parametrize("run", [""], indirect=True)


@pytest.fixture
def in_time() -> Iterator[None]:
    """End a process that waits for a pipe."""

    def fail(*_: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def small_run() -> RunConfig:
    return load_config(SMALL_RUN, overrides={("run", "output"): "run"})


def refused(done: Done, *wanted: str) -> None:
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    for part in wanted:
        assert part in done.err, done.err


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))  # which stays there


# --- what is a run's --------------------------------------------------------------------------


def test_the_list_names_every_file_of_a_run(run: RunDirectory) -> None:
    there = {path.name for path in Path("run").iterdir() if path.is_file()} - {"ppo-cli.json"}
    assert there == LISTED
    assert run.inventory.names() == LISTED
    assert run.inventory.strangers() == []


def test_a_run_is_replaced_whole(run: RunDirectory) -> None:
    done = ppo_cli(*TRAIN, "--overwrite", "--steps", 1, cwd=Path.cwd())
    assert done.code == 0, done.err
    there = {path.name for path in Path("run").iterdir()}
    assert there == LISTED - {"frontier.png"} | {"ppo-cli.json", "checkpoints"}
    assert {path.name for path in Path("run/checkpoints").iterdir()} <= {
        ".lock", "step-000000", "step-000001",
    }  # fmt: skip
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1
    assert RunDirectory("run").inventory.names() == LISTED


def test_a_run_without_a_list_goes_on_and_has_one_then(run: RunDirectory) -> None:
    done = ppo_cli("train", "--output", "run", "--resume", "--steps", 3, cwd=Path.cwd())
    assert done.code == 0, done.err
    assert set(json.loads(Path("run/ppo-cli.json").read_text())["files"]) == LISTED


STRANGERS: dict[str, Callable[[Path], object]] = {
    "thesis.txt": lambda path: path.write_text("three years"),
    ".hidden": lambda path: path.write_text("three years"),
    "metrics.jsonl.1": lambda path: path.write_text("three years"),
    ".thesis.txt.tmp": lambda path: path.write_text("three years"),
    "pytorch_model.bin": lambda path: path.write_text("three years"),
    "helper.py": lambda path: path.write_text("three years"),
    ".git/": lambda path: shutil.copytree(policy_folder(), path),
    "empty/": Path.mkdir,
    "checkpoints/notes.txt": lambda path: path.write_text("three years"),
    "checkpoints/mine/": Path.mkdir,
    f"{STEP}/notes.txt": lambda path: path.write_text("three years"),
    f"{STEP}/mine": Path.mkdir,
    "link": lambda path: path.symlink_to("../elsewhere"),
    "checkpoints/step-000009": lambda path: path.symlink_to("../../elsewhere"),
    "pipe": make_pipe,
    "socket": make_socket,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_run_with_a_stranger_is_not_replaced(name: str, run: RunDirectory) -> None:
    STRANGERS[name](Path("run", name))
    before = snapshot(Path("run"))
    assert run.inventory.strangers() == [name]
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        run.create(small_run(), overwrite=True)
    assert snapshot(Path("run")) == before


@LISTED_RUN
def test_overwrite_names_a_few_strangers_and_counts_the_others(run: RunDirectory) -> None:
    for number in range(9):
        Path(f"run/note{number}.txt").write_text("mine")
    before = snapshot(Path("run"))
    done = ppo_cli(*TRAIN, "--overwrite", cwd=Path.cwd())
    refused(done, "note0.txt, note1.txt, note2.txt, note3.txt, note4.txt and 4 more")
    assert snapshot(Path("run")) == before
    assert (
        ppo_cli(
            "train", "--output", "run", "--resume", "--dry-run", "--no-measure", cwd=Path.cwd()
        ).code
        == 0
    )


@pytest.mark.parametrize("name", sorted({*LISTED, "checkpoints", STEP, *CHECKPOINT}))
def test_a_link_in_place_of_a_file_is_a_stranger(name: str, run: RunDirectory) -> None:
    path, elsewhere = Path("run", name), Path("elsewhere")
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere.absolute())
    if run.is_run():  # which run.yaml of an older release says also by a link
        strangers = run.inventory.strangers()
        assert len(strangers) == 1
        assert f"{name}/".startswith(f"{strangers[0]}/".replace("//", "/"))
    before = snapshot(Path.cwd())
    for act in (run.check_resumable, lambda: run.create(small_run(), overwrite=True)):
        with pytest.raises(UsageError, match=r"is a link|which no run wrote"):
            act()
    assert snapshot(Path.cwd()) == before


RECORD = {
    "versions": {"ppo-cli": "0.1.0"},
    "config": load_config(SMALL_RUN).model_dump(mode="json"),
}
FOREIGN: dict[str, tuple[str, bytes]] = {
    "a workflow": ("run.yaml", b"name: my workflow\nsteps: [build]\n"),
    "a configuration": ("run.yaml", yaml.safe_dump(RECORD["config"]).encode()),
    "a list": ("run.yaml", b"- config\n"),
    "a config of another kind": ("run.yaml", b"versions: {a: 1}\nconfig: {ppo: {}, run: {}}\n"),
    "bytes": ("run.yaml", bytes(range(256))),
    "a list of others": ("ppo-cli.json", b'{"written_by": "me", "files": ["thesis.txt"]}'),
    "a list without files": ("ppo-cli.json", b'{"written_by": "ppo-cli"}'),
    "a broken list": ("ppo-cli.json", b'{"written_by": "ppo-cli", "files": ["thesis.txt"'),
    "a deep list": ("ppo-cli.json", b"[" * 100_000),
    **{
        f"a list with {path}": (
            "ppo-cli.json", json.dumps({"written_by": "ppo-cli", "files": [path]}).encode(),
        )
        for path in ("../x", "/etc/passwd", "a/../../x", "", "..\\x", "C:\\x", "\0")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_others_is_no_run_whatever_its_files_are_called(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content = FOREIGN[kind]
    Path("run").mkdir()
    Path("run", name).write_bytes(content)
    Path("run/README.md").write_text("mine")
    Path("thesis.txt").write_text("three years")
    before = snapshot(tmp_path)
    assert not RunDirectory("run").is_run()
    with pytest.raises(UsageError, match="no run directory"):
        RunDirectory.existing("run")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is no run directory and is not overwritten"):
            RunDirectory("run").create(small_run(), overwrite)
    assert snapshot(tmp_path) == before


def test_commands_leave_another_programs_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(policy_folder(), folder)
    (folder / "run.yaml").write_text("name: my workflow\nsteps: [build]\n")
    before = snapshot(tmp_path)
    refused(ppo_cli(*TRAIN, "--overwrite", cwd=tmp_path), "is no run directory and is not over")
    refused(ppo_cli(*TRAIN, "--resume", cwd=tmp_path), "another program's")
    refused(ppo_cli("stats", "run", cwd=tmp_path), "another program's")
    done = ppo_cli("generate", "run", "--max-new-tokens", 2, cwd=tmp_path)
    assert done.code == 0, done.err  # it is a model all the same
    refused(ppo_cli("compare", "run", cwd=tmp_path), "run is no run directory", "--classifier")
    assert snapshot(tmp_path) == before


def test_a_copy_of_run_yaml_alone_gives_nothing_else_away(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    shutil.copy(finished / "run.yaml", "run")
    Path("run/README.md").write_text("mine")
    with pytest.raises(UsageError, match="README"):
        RunDirectory("run").create(small_run(), overwrite=True)
    assert Path("run/README.md").read_text() == "mine"


def test_a_kill_while_a_run_is_replaced_leaves_what_can_be_replaced(run: RunDirectory) -> None:
    before = Path.cwd()
    first = 1 + Path("run/ppo-cli.json").exists()
    for number in range(first, 1000, 3):
        folder = before.with_name(f"{before.name}-{number}")
        shutil.copytree(before, folder, symlinks=True)
        code = start(cwd=folder, fault=partial(faults.begin_anew, number, SMALL_RUN)).wait().code
        killed = RunDirectory(folder / "run")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        names = {path.name for path in killed.path.iterdir()}
        assert killed.inventory.strangers() == []
        if "run.yaml" not in names:  # no mixture: what says where the model is from went last
            assert not names & {"metrics.jsonl", "samples.jsonl"}
        killed.create(small_run(), overwrite=True)
        killed.unlock()
        assert {path.name for path in killed.path.iterdir()} == {
            "run.yaml", "ppo-cli.json", "checkpoints",
        }  # fmt: skip
        shutil.rmtree(folder)
    assert number > len(LISTED) + len(CHECKPOINT)


# --- inputs -----------------------------------------------------------------------------------


def put_adapter(folder: str, base: str) -> str:
    Path(folder).mkdir()
    content = {"base_model_name_or_path": base, "peft_type": "LORA"}
    Path(folder, "adapter_config.json").write_text(json.dumps(content))
    return folder


def put_link(link: str, target: str) -> str:
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to(Path(target).absolute())
    return link


# Inputs in the folder that is to be written: key -> setting.
INPUTS: dict[str, tuple[str, Callable[[], str]]] = {
    "the model": ("policy.model", lambda: "run"),
    "the model, in other words": ("policy.model", lambda: "./x/../run/"),
    "the model, absolute": ("policy.model", lambda: os.path.abspath("run")),
    "the model, by a link": ("policy.model", lambda: put_link("link", "run")),
    "the model of an adapter": ("policy.model", lambda: put_adapter("adapter", "run")),
    "a model of links": (
        "policy.model",
        lambda: str(Path(put_link("model/model.safetensors", "run/model.safetensors")).parent),
    ),
    "a checkpoint": ("policy.model", lambda: f"run/{STEP}"),
    "the classifier": ("reward.model", lambda: "run"),
    "prompts": ("prompts.source", lambda: "run/samples.jsonl"),
    "prompts by a link": ("prompts.source", lambda: put_link("texts.jsonl", "run/samples.jsonl")),
    "prompts by a pattern": ("prompts.source", lambda: "*/samples.jsonl"),
    "a folder of prompts around it": ("prompts.source", lambda: "."),
    "a model around it": ("policy.model", lambda: ".."),
}


@LISTED_RUN
@pytest.mark.parametrize("kind", INPUTS)
def test_a_run_does_not_replace_what_it_reads(kind: str, run: RunDirectory) -> None:
    key, name = INPUTS[kind][0], INPUTS[kind][1]()
    Path("x").mkdir()
    before = snapshot(Path.cwd())
    assignments = [f"{key}={json.dumps(name)}", "run.output=run"]
    settings = load_config(SMALL_RUN, assignments=assignments)
    for overwrite in (True, False):
        with pytest.raises(UsageError, match=f"{key} .*--output"):
            RunDirectory("run").create(settings, overwrite)
    assert snapshot(Path.cwd()) == before


@LISTED_RUN
def test_the_command_does_not_replace_what_it_reads(run: RunDirectory) -> None:
    Path("run/own.yaml").write_text(Path(SMALL_RUN).read_text())
    before = snapshot(Path.cwd())
    for further in (
        ["--set", "policy.model=run"],
        ["--config", "run/own.yaml"],
        ["--set", "prompts.source=run/samples.jsonl", "--set", "prompts.text_column=query"],
    ):
        done = ppo_cli(*TRAIN, "--overwrite", *further, cwd=Path.cwd())
        refused(done, further[1].partition("=")[2] or further[1], "where the run is to be written")
    assert snapshot(Path.cwd()) == before


@LISTED_RUN
def test_names_that_only_look_alike_are_no_inputs_here(run: RunDirectory) -> None:
    shutil.copytree("run", "run2")
    Path("tiny").mkdir()
    Path("embedded").mkdir()
    settings = load_config(
        SMALL_RUN, assignments=["policy.model=run2", "prompts.source=org/run", "run.output=run"]
    )
    run.check_writable(True, inputs_of(settings))
    RunDirectory("embedded").check_writable(True, inputs_of(load_config("tiny")))
    done = ppo_cli(
        "train", "--config", "tiny", "--output", "tiny", "--dry-run", "--no-measure", cwd=Path.cwd()
    )
    assert done.code == 0, done.err


# --- paths that files name --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../victim.txt", "{here}/victim.txt", "model.safetensors"])
def test_a_checkpoint_shortens_nothing_but_the_records(name: str, run: RunDirectory) -> None:
    name = name.format(here=Path.cwd())
    Path("victim.txt").write_text("precious\n" * 10)
    checkpoint = Path("run", STEP)
    state = json.loads((checkpoint / "state.json").read_text())
    state["records"][name] = 0
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = hashlib.sha256(
        (checkpoint / "state.json").read_bytes()
    ).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    before = snapshot(Path.cwd())
    done = ppo_cli("train", "--output", "run", "--resume", "--steps", 3, cwd=Path.cwd())
    refused(done, Path(name).name, "among the records")
    after = snapshot(Path.cwd())
    assert {path for path in {**before, **after} if before.get(path) != after.get(path)} <= {
        str(Path.cwd() / "run/checkpoints"), str(Path.cwd() / "run/checkpoints/.lock.json"),
    }  # fmt: skip


@LISTED_RUN
def test_a_copy_by_hard_links_is_resumed_without_changing_the_original(run: RunDirectory) -> None:
    shutil.copytree("run", "copy", copy_function=os.link)
    os.unlink("copy/checkpoints/.lock")  # which is one lock for both
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    done = ppo_cli("train", "--output", "copy", "--resume", "--steps", 3, cwd=Path.cwd())
    assert done.code == 0, done.err
    assert {path: path.read_bytes() for path in before} == before
    assert len(Path("copy/metrics.jsonl").read_text().splitlines()) == 3


def make_sharded(folder: Path) -> list[Path]:
    make_gpt2().save_pretrained(folder, max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder)
    return sorted(folder.glob("*-of-*"))


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_of_a_models_folder_are_not_read(absolute: bool, tmp_path: Path) -> None:
    shards = make_sharded(tmp_path / "model")
    (tmp_path / "other").mkdir()
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    there = str(tmp_path / "other") if absolute else "../other"
    for shard in shards:
        shard.rename(tmp_path / "other" / shard.name)
    content["weight_map"] = {k: f"{there}/{v}" for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    name = str(tmp_path / "model")
    for load in (lambda: load_policy(PolicyConfig(model=name)), lambda: SentimentReward(name)):
        with pytest.raises(ModelError, match=r"index\.json names .*outside of the folder"):
            load()


def test_a_configuration_names_no_weights_outside_of_a_models_folder(tmp_path: Path) -> None:
    make_sharded(tmp_path / "model")
    config = tmp_path / "model/config.json"
    content = json.loads(config.read_text()) | {"transformers_weights": "../x.safetensors"}
    config.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"config\.json names .*outside of the folder"):
        load_policy(PolicyConfig(model=str(tmp_path / "model")))


def test_a_tokenizer_outside_of_a_models_folder_is_not_read(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").rename(tmp_path / "tokenizer.4.0.0.json")
    config = tmp_path / "model/tokenizer_config.json"
    content = json.loads(config.read_text()) | {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}
    config.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json names .*outside of the folder"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_model_whose_files_are_links_is_read(tmp_path: Path) -> None:
    shards = make_sharded(tmp_path / "model")
    assert len(shards) > 1
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate((tmp_path / "model").iterdir()):  # as the hub's cache has it
        blob = tmp_path / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(Path("../blobs") / blob.name)
    load_tokenizer(str(tmp_path / "model"))
    load_policy(PolicyConfig(model=str(tmp_path / "model")))


@LISTED_RUN
def test_a_run_whose_files_are_links_is_read_and_not_written(run: RunDirectory) -> None:
    Path("elsewhere").mkdir()
    for name in LISTED:
        Path("run", name).rename(Path("elsewhere", name))
        Path("run", name).symlink_to(Path("../elsewhere") / name)
    before = snapshot(Path.cwd())
    for command in (
        ["stats", "run"], ["plot", "run", "--terminal"], ["generate", "run", "--max-new-tokens", 2],
    ):  # fmt: skip
        done = ppo_cli(*command, cwd=Path.cwd())
        assert done.code == 0, done.err
    refused(ppo_cli("plot", "run", cwd=Path.cwd()), "training.png is a link")
    refused(ppo_cli(*TRAIN, "--resume", cwd=Path.cwd()), "is a link")
    refused(ppo_cli(*TRAIN, "--overwrite", cwd=Path.cwd()), "README.md, config.json")
    assert snapshot(Path.cwd()) == before


# --- pipes, sockets -----------------------------------------------------------------------------


@LISTED_RUN
@pytest.mark.parametrize("name", FILES)
def test_what_would_be_waited_for_is_refused(name: str, run: RunDirectory, in_time: None) -> None:
    if name == "ppo-cli.json" and not Path("run", name).exists():
        return
    Path("run", name).unlink()
    make_pipe(Path("run", name))
    for act in (run.check_resumable, lambda: run.create(small_run(), overwrite=True)):
        with pytest.raises(UsageError, match=r"device, pipe or socket|no run directory|which no"):
            act()
    if not name.startswith("checkpoints"):
        with pytest.raises(UsageError, match="device, pipe or socket"):
            load_policy(PolicyConfig(model="run"))


def test_commands_do_not_wait_for_pipes(finished: Path, tmp_path: Path) -> None:
    reading = {
        "run.yaml": [["stats", "run"], ["plot", "run"], ["train", "--output", "run", "--resume"]],
        "ppo-cli.json": [["stats", "run"], ["train", "--output", "run", "--resume"]],
        "metrics.jsonl": [["stats", "run"], ["plot", "run"], ["plot", "run", "--frontier"]],
        "frontier.json": [["plot", "run", "--frontier", "--output", "x.png"]],
        "samples.jsonl": [["stats", "run"], ["plot", "run"], ["compare", "run"]],
        "config.json": [["generate", "run"], ["compare", "run"]],
        "model.safetensors": [["generate", "run"]],
        f"{STEP}/state.json": [["train", "--output", "run", "--resume", "--steps", 3]],
    }
    for name, commands in reading.items():
        shutil.copytree(finished, tmp_path / "run")
        (tmp_path / "run" / name).unlink()
        make_pipe(tmp_path / "run" / name)
        before = snapshot(tmp_path)
        for command in commands:
            done = start(*command, cwd=tmp_path).wait(timeout=60)
            refused(done, Path(name).name, "device, pipe or socket")
        assert snapshot(tmp_path) == before
        shutil.rmtree(tmp_path / "run")
    make_pipe(tmp_path / "p.yaml")
    refused(start("config", "p.yaml", cwd=tmp_path).wait(timeout=60), "p.yaml", "pipe or socket")


# --- results ------------------------------------------------------------------------------------


def other_names(path: Path) -> Iterator[Path]:
    """Further names of a file: relative ones, through a linked folder, a hard link."""
    yield path
    yield path.absolute()
    yield path.parent / ".." / path.parent.name / path.name
    link = Path("linked_folder")
    link.unlink(missing_ok=True)
    link.symlink_to(path.parent.absolute())
    yield link / path.name
    hard = Path("hard_link")
    hard.unlink(missing_ok=True)
    if path.exists():
        os.link(path, hard)
        yield hard


@pytest.mark.parametrize("name", FILES)
def test_no_result_replaces_a_file_of_a_run(name: str, run: RunDirectory) -> None:
    for output in other_names(Path("run", name)):
        if output.name == "hard_link" and name.startswith("checkpoints"):
            continue  # replacing one name of a file leaves the others as they are
        with pytest.raises(UsageError, match=r"not replaced|run's checkpoints"):
            check_output(str(output), ["run"])
    Path("run", name).unlink(missing_ok=True)
    if name not in ("run.yaml", "ppo-cli.json"):  # which make it a run
        with pytest.raises(UsageError, match=r"not replaced|run's checkpoints"):
            check_output(f"run/{name}")


MODEL = [
    "config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", "merges.txt",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "x.gguf",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "adapter_config.json",
    "adapter_model.safetensors", "value_head.safetensors", "modeling_own.py", "README.md",
]  # fmt: skip


@pytest.mark.parametrize("name", MODEL)
def test_no_result_replaces_a_file_of_a_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(policy_folder(), "model")
    Path("model", name).touch()
    for output in other_names(Path("model", name)):
        with pytest.raises(UsageError, match="not replaced"):
            check_output(str(output), ["model"])
    check_output("model/samples.md", ["model"])


def test_no_result_replaces_what_is_read_or_another_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/few.txt").write_text("This film\n" * 20)
    for output in other_names(Path("texts/few.txt")):
        with pytest.raises(UsageError, match="not replaced"):
            check_output(str(output), ["model", "texts/few.txt"])
    Path("texts/page.html").touch()
    for output in other_names(Path("texts/page.html")):
        with pytest.raises(UsageError, match="are one file"):
            check_outputs({"--output": "texts/page.html", "--html": str(output)}, [])
    with pytest.raises(UsageError, match="are one file"):
        check_outputs({"--output": "new", "--html": "texts/../new"}, [])
    check_outputs({"--output": "a", "--html": "b"}, ["texts/few.txt"])


@LISTED_RUN
def test_commands_keep_the_files_of_models_runs_and_prompts(run: RunDirectory) -> None:
    here = Path.cwd()
    shutil.copytree(policy_folder(), "model")
    Path("few.txt").write_text("This film\n" * 20)
    Path("texts.txt").write_text("This film was fine and I liked it.\n" * 64)
    settings = yaml.safe_load(Path("run/run.yaml").read_text())
    settings["config"]["prompts"]["source"] = "texts.txt"
    Path("run/run.yaml").write_text(yaml.safe_dump(settings))
    before = snapshot(here)
    generate = ["generate", "model", "--no-score", "--max-new-tokens", 2]
    for command, wanted in (
        ([*generate, "--output", "model/model.safetensors"], "not replaced"),
        ([*generate, "--output", "run/metrics.jsonl"], "not replaced"),
        ([*generate, "--output", f"run/{STEP}/new"], "run's checkpoints"),
        ([*generate, "--prompts", "few.txt", "--output", "./few.txt"], "not replaced"),
        (["compare", "run", "--output", "texts.txt"], "not replaced"),  # the run's own prompts
        (["compare", "run", "--html", "run/README.md"], "not replaced"),
        (["compare", "run", "--html", "page", "--output", "run/../page"], "are one file"),
        (["plot", "run", "--output", "run/frontier.png"], "not replaced"),
        (["plot", "run", "--frontier", "--output", "run/training.png"], "not replaced"),
        (["train", "--config", SMALL_RUN, "--output", "run/checkpoints/new"], "run's checkpoints"),
    ):
        refused(ppo_cli(*command, cwd=here), wanted)
    assert snapshot(here) == before
    for command in (
        ["plot", "run"], ["plot", "run", "--output", "run/training.png"],
        ["plot", "run", "--frontier"], ["plot", "run", "--output", "run/other.png"],
        [*generate, "--output", "new.txt"], [*generate, "--output", "new.txt"],
    ):  # fmt: skip
        done = ppo_cli(*command, cwd=here)
        assert done.code == 0, done.err


# --- while a run goes on ------------------------------------------------------------------------


def test_a_checkpoint_with_a_strangers_file_is_not_deleted(tmp_path: Path) -> None:
    for step in range(3):
        save_checkpoint(tmp_path, step, make_gpt2(), {}, keep=9)
    (tmp_path / "step-000000/notes.txt").write_text("mine")
    (tmp_path / ".step-notes").mkdir()
    (tmp_path / ".step-000004.tmp").mkdir()  # which a killed process left
    with pytest.warns(UserWarning, match=r"step-000000 is kept: it holds notes\.txt"):
        prune(tmp_path, keep=1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".step-notes", "step-000000", "step-000002"}
    assert (tmp_path / "step-000000/notes.txt").read_text() == "mine"


def test_a_model_is_not_saved_over_a_strangers_file(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path)
    inventory.begin(["run.yaml"])
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"config\.json.*move that elsewhere"):
        save_folder(make_policy(), make_tokenizer(), inventory)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "ppo-cli.json"}
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "config.json").unlink()
    save_folder(make_policy(), make_tokenizer(), inventory)
    assert inventory.strangers() == []


def test_a_model_is_saved_over_equal_files_that_no_list_has(tmp_path: Path) -> None:
    save_folder(make_policy(), make_tokenizer(), Inventory(tmp_path))
    (tmp_path / "ppo-cli.json").unlink()
    save_folder(make_policy(), make_tokenizer(), Inventory(tmp_path))


def test_a_link_called_as_the_unfinished_model_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/thesis.txt").write_text("three years")
    (tmp_path / "run/.model.tmp").symlink_to("../documents")
    with pytest.raises(FileExistsError):
        save_folder(make_policy(), make_tokenizer(), Inventory(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "documents").iterdir()] == ["thesis.txt"]


def test_a_tokenizers_templates_are_listed_saved_again_and_deleted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    inventory = Inventory(tmp_path)
    for _ in range(2):
        save_folder(make_policy(), tokenizer, inventory)
        assert inventory.strangers() == []
    assert (tmp_path / "additional_chat_templates/tools.jinja").read_text() == "{{ tools }}"
    inventory.begin(["run.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["ppo-cli.json"]
