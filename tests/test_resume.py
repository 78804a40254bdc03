"""A resumed run equals one that never paused, or is refused, or warns: in real processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ppo_cli.config.loading import change_config, load_config
from ppo_cli.data.embedded import TRAIN_SEED, classifier_folder, policy_folder
from ppo_cli.data.embedded.grammar import reviews
from ppo_cli.errors import UsageError
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.learning_rate import learning_rate_factor
from ppo_cli.training.resume import resumed_config
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import SMALL_RUN
from tests.forked import Done, ppo_cli
from tests.stress.kill import contents, differences

NAMED = [
    "--set", "policy.model=./model", "--set", "reward.model=judge",
    "--set", "prompts.source=texts.txt",
]  # fmt: skip
TRAIN = [
    "train", "--config", SMALL_RUN, "--quiet", "--output", "run", "--set", "run.checkpoint_every=1",
    "--set", "rollout.output_min_length=4", "--set", "rollout.output_max_length=8",
]  # fmt: skip
RESUME = ["train", "--output", "run", "--resume", "--quiet"]


def make_inputs(home: Path) -> None:
    shutil.copytree(policy_folder(), home / "model")
    shutil.copytree(classifier_folder(), home / "judge")
    (home / "texts.txt").write_text("\n".join(r.text for r in reviews(90, TRAIN_SEED)))


def succeeded(done: Done) -> Done:
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, a run of two steps, and `whole`, a run of four steps."""
    home = tmp_path_factory.mktemp("made")
    make_inputs(home)
    succeeded(ppo_cli(*TRAIN, *NAMED, cwd=home))
    succeeded(ppo_cli(*TRAIN, *NAMED, "--output", "whole", "--steps", 4, cwd=home))
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, with its absolute paths."""
    home = tmp_path / "home"
    shutil.copytree(made, home)
    for name in ("run", "whole"):
        record = home / name / "run.yaml"
        record.write_text(record.read_text().replace(str(made), str(home)))
    return home


def same_as_whole(run: Path) -> bool:
    """Whether a run equals the one that never paused, except in its name."""
    expected, found = contents(run.parents[0] / "whole"), contents(run)
    for text in (expected, found):
        del text["README.md"], text["run.yaml"]
    return differences(expected, found) == []


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, text
    path.write_text(text.replace(old, new))


# ---------------------------------------------------------------- inputs


def test_inputs_are_found_from_another_folder_even_where_others_have_their_names(
    home: Path,
) -> None:
    away = home / "away"
    (away / "model").mkdir(parents=True)
    (away / "model" / "config.json").write_text("{}")
    (away / "texts.txt").write_text("Other texts.\n" * 99)
    done = ppo_cli(*RESUME, "--output", "../run", "--steps", 4, cwd=away)
    assert succeeded(done).err == "resuming with changed settings: run.steps 2 -> 4\n"
    assert same_as_whole(home / "run")
    settings = yaml.safe_load((home / "run" / "run.yaml").read_text())["config"]
    assert settings["policy"]["model"] == "./model"  # as it was given

    done = ppo_cli("compare", "../run", "--samples", 2, "--rows", 0, cwd=away)
    assert "warning" not in succeeded(done).err
    done = ppo_cli("generate", "../run", "--reference", cwd=away)
    assert "warning" not in succeeded(done).err


def test_a_folder_that_was_moved_as_a_whole_goes_on(home: Path) -> None:
    moved = home.rename(home.parent / "moved")
    done = succeeded(ppo_cli(*RESUME, "--dry-run", "--no-measure", cwd=moved))
    assert done.err.startswith("all is well")


def test_an_input_that_was_moved_can_be_named_anew_but_no_other(home: Path) -> None:
    (home / "model").rename(home / "renamed")
    gone = ppo_cli(*RESUME, cwd=home)
    assert gone.code == 2
    for part in ("policy.model ./model is not there", f"it was {home / 'model'}"):
        assert part in gone.err
    anew = ["--steps", 4, "--set", "policy.model=renamed"]
    succeeded(ppo_cli(*RESUME, *anew, cwd=home))
    assert same_as_whole(home / "run")
    other = ppo_cli(*RESUME, "--set", "reward.model=renamed", cwd=home)
    assert other.code == 2
    assert "reward.model renamed: config.json has changed" in other.err


def test_without_a_record_of_an_input_its_name_may_not_change(tmp_path: Path) -> None:
    config = load_config(SMALL_RUN)
    run = RunDirectory(tmp_path)
    run.record(config, {"inputs": {"reward.model": {"name": "embedded", "files": {}}}})
    wanted = change_config(config, assignments=["reward.model=x", "reward.revision=y"])
    assert resumed_config(run, wanted)[1] == [
        'reward.model "embedded" -> "x"', 'reward.revision null -> "y"'
    ]  # fmt: skip
    for change in ("policy.model=x", "policy.revision=x", "prompts.source=x"):
        with pytest.raises(UsageError, match=change.partition("=")[0]):
            resumed_config(run, change_config(config, assignments=[change]))


CHANGES: dict[str, tuple[str, list[str]]] = {
    "model/config.json": ("policy.model ./model", ["config.json has changed (sha256 "]),
    "model/model.safetensors": ("policy.model ./model", ["model.safetensors has changed"]),
    "judge/tokenizer.json": ("reward.model judge", ["tokenizer.json has changed"]),
    "texts.txt": ("prompts.source texts.txt", ["texts.txt has changed"]),
}


@pytest.mark.parametrize("file", CHANGES)
def test_a_changed_input_is_refused_by_name_and_taken_where_that_is_asked_for(
    file: str, home: Path
) -> None:
    key, wanted = CHANGES[file]
    before = contents(home / "run")
    content = (home / file).read_bytes()
    # A space is added to JSON and text; in the weights one bit of the last number changes.
    new = (
        content + b" " if not file.endswith("safetensors") else content[:-4] + b"\1" + content[-3:]
    )
    assert new != content
    (home / file).write_bytes(new)
    refused = ppo_cli(*RESUME, "--steps", 3, cwd=home)
    assert refused.code == 2
    digest = hashlib.sha256(content).hexdigest()[:12]
    for part in ("was started with other inputs", key, digest, "--allow-changed-inputs", *wanted):
        assert part in refused.err
    assert refused.err.count("error: ") == 1
    assert differences(before, contents(home / "run")) == []
    if file == "texts.txt":
        done = ppo_cli(*RESUME, "--steps", 3, "--allow-changed-inputs", cwd=home)
        assert f"warning: going on with changed inputs: {key}" in succeeded(done).err
        again = ppo_cli(*RESUME, cwd=home)  # now these are its inputs
        assert succeeded(again).err == ""


def test_who_compares_with_a_changed_reference_is_told(home: Path) -> None:
    edit(home / "model" / "generation_config.json", "{", "{ ")
    edit(home / "judge" / "config.json", '"transformers_version"', ' "transformers_version"')
    done = succeeded(ppo_cli("compare", "run", "--samples", 2, "--rows", 0, cwd=home))
    assert done.err.count("warning: not as it was when the run began: policy.model ./model") == 1
    assert done.err.count("warning: not as it was when the run began: reward.model judge") == 1
    done = succeeded(ppo_cli("generate", "run", "--no-score", cwd=home))
    assert "warning" not in done.err  # neither is used


# ---------------------------------------------------------------- settings, code and machine


def test_an_edited_setting_is_told_by_name(home: Path) -> None:
    edit(home / "run" / "run.yaml", "gamma: 1.0", "gamma: 0.5")
    refused = ppo_cli(*RESUME, "--steps", 3, cwd=home)
    assert refused.code == 2
    for part in ("run.yaml was edited", "ppo.gamma 1.0 -> 0.5", "put back", "--overwrite"):
        assert part in refused.err
    edit(home / "run" / "run.yaml", "gamma: 0.5", "gamma: 1.0")
    edit(home / "run" / "run.yaml", "steps: 2", "steps: 4")
    done = ppo_cli(*RESUME, cwd=home)
    assert succeeded(done).err == "resuming with changed settings: run.steps 2 -> 4\n"
    assert same_as_whole(home / "run")


def test_another_number_of_threads_changes_nothing(home: Path) -> None:
    two = partial(torch.set_num_threads, 2)
    done = ppo_cli(*RESUME, "--steps", 4, cwd=home, fault=two)
    assert "warning: computing with 1 thread, as the run was started, not with 2" in done.err
    assert succeeded(done).err.count("warning") == 1
    assert same_as_whole(home / "run")
    machine = yaml.safe_load((home / "run" / "run.yaml").read_text())["machine"]
    assert machine["threads"] == 1


def test_other_versions_and_another_machine_are_said_in_one_line(home: Path) -> None:
    record = home / "run" / "run.yaml"
    edit(record, f"torch: {torch.__version__}", "torch: 1.0.0")
    edit(record, "threads: 1", "threads: 1000000")  # more than there are processors
    edit(record, "  device: cpu (", "  device: NVIDIA (")
    done = succeeded(ppo_cli(*RESUME, "--dry-run", "--no-measure", cwd=home))
    assert done.err.count("warning") == 1
    for part in (
        f"torch 1.0.0 (now {torch.__version__})", "threads 1000000 (now 1)", "device NVIDIA (",
        "(now cpu (", "other digits",
    ):  # fmt: skip
        assert part in done.err


def test_more_steps_under_a_schedule_take_its_new_course_and_that_is_said(tmp_path: Path) -> None:
    train = [*TRAIN, "--set", "ppo.lr_scheduler_type=linear"]
    succeeded(ppo_cli(*train, "--steps", 2, cwd=tmp_path))
    done = succeeded(ppo_cli(*RESUME, "--steps", 4, cwd=tmp_path))
    assert done.err.count("warning: the learning rate's course depends on run.steps") == 1
    for part in ("linear", "up to step 2 it was that of 2 steps", "that of 4"):
        assert part in done.err
    rates = [json.loads(x)["ppo/learning_rate"] for x in (tmp_path / "run/metrics.jsonl").open()]
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "adaptive"])
@pytest.mark.parametrize("end", [0.0, 0.3, 1.0])
def test_whether_a_learning_rate_depends_on_the_number_of_steps(kind: Any, end: float) -> None:
    def course(steps: int) -> list[float]:
        config = PPOConfig(lr_scheduler_type=kind, min_lr_ratio=end, steps=steps * 128)
        return [learning_rate_factor(config, step) for step in range(4)]

    config = PPOConfig(lr_scheduler_type=kind, min_lr_ratio=end)
    assert config.rate_depends_on_steps == (course(4) != course(6))


# ---------------------------------------------------------------- records


def damaged(content: bytes) -> dict[str, bytes | None]:
    """A record of three steps in several states of damage."""
    first, *_ = lines = content.splitlines(keepends=True)
    return {
        "gone": None,
        "empty": b"",
        "cut": content[: -len(lines[-1]) // 2],
        "without its first line": b"".join(lines[1:]),
        "spoilt": b"\xff\x00\n" + content[3:],  # as long as it was
        "binary": bytes(range(256)) * 20,
        "other kinds": b'{"step": 1, "a": "low"}\n[]\nnull\n3\n{"step": "2"}\n{"step": 9}\n{}\n',
        "twice and behind": first + content + first + b'{"step": 4, "a": 1}\n{"step"',
    }


@pytest.mark.parametrize("state", damaged(b"\n"))
def test_a_damaged_record_keeps_the_whole_lines_of_its_steps(state: str, tmp_path: Path) -> None:
    def line(step: int) -> bytes:
        return json.dumps({"step": step, "a": step / 3}).encode() + b"\n"

    content = line(1) + line(2) + line(3)
    found = damaged(content)[state]
    record = tmp_path / "metrics.jsonl"
    if found is not None:
        record.write_bytes(found)
    run = RunDirectory(tmp_path)
    with pytest.warns(UserWarning, match="records were damaged or lost") as said:
        run.records.restore({"metrics.jsonl": len(content)}, 3)
    assert len(said) == 1
    left = [step for step in (1, 2, 3) if found is not None and line(step) in found]
    assert record.read_bytes() == b"".join(line(step) for step in left)
    assert [row["step"] for row in run.records.rows()] == left
    missing = {
        (): "steps 1 to 3", (1, 2): "step 3", (2, 3): "step 1", (1, 2, 3): ""
    }[tuple(left)]  # fmt: skip
    assert (f"(nothing of {missing})" in str(said[0].message)) == bool(missing)


def test_whole_records_are_cut_in_silence_and_no_others_touched(tmp_path: Path) -> None:
    row = b'{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(row + b'{"step": 2}\n{"st')
    (tmp_path / "notes").write_bytes(row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = RunDirectory(tmp_path)
        run.records.restore({"metrics.jsonl": len(row), "samples.jsonl": 0, "notes": 99}, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == row
    assert (tmp_path / "notes").read_bytes() == row


def test_damaged_records_do_not_stop_a_run(home: Path) -> None:
    run = home / "run"
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\xff" + content[1:])
    (run / "samples.jsonl").unlink()
    done = succeeded(ppo_cli(*RESUME, "--steps", 4, cwd=home))
    assert done.err.count("warning") == 1
    for part in ("metrics.jsonl (nothing of step 1)", "samples.jsonl (nothing of steps 1 to 2)"):
        assert part in done.err
    expected, found = contents(home / "whole"), contents(run)
    assert found["metrics.jsonl"] == expected["metrics.jsonl"][1:]
    assert found["samples.jsonl"] == [r for r in expected["samples.jsonl"] if r["step"] > 2]
    for name in ("README.md", "run.yaml", "metrics.jsonl", "samples.jsonl"):
        del expected[name], found[name]
    assert differences(expected, found) == []


def test_a_finished_run_without_its_records_still_has_its_summary(home: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        (home / "run" / name).unlink()
    done = succeeded(ppo_cli(*RESUME, "--json", cwd=home))
    assert json.loads(done.out)["steps"] == 2
    assert "nothing of steps 1 to 2" in done.err


# ---------------------------------------------------------------- earlier releases


def test_a_run_without_records_of_inputs_and_settings_goes_on_as_before(home: Path) -> None:
    record = home / "run" / "run.yaml"
    kept = ("versions", "git_commit", "config")
    old = {k: v for k, v in yaml.safe_load(record.read_text()).items() if k in kept}
    record.write_text(yaml.safe_dump(old, sort_keys=False))
    for folder in (home / "run" / "checkpoints").glob("step-*"):
        state = json.loads((folder / "state.json").read_text())
        del state["settings"]
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        digest = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
        manifest["sha256"]["state.json"] = digest
        (folder / "manifest.json").write_text(json.dumps(manifest))
    succeeded(ppo_cli("compare", "run", "--samples", 2, "--rows", 0, cwd=home))
    changed = ppo_cli(*RESUME, "--set", "policy.model=embedded", cwd=home)
    assert changed.code == 2
    assert "made with other settings (policy.model" in changed.err
    done = ppo_cli(*RESUME, "--steps", 4, cwd=home)
    assert succeeded(done).err.count("warning") == 1
    assert "no record of its inputs" in done.err
    assert same_as_whole(home / "run")
    assert "inputs" in yaml.safe_load(record.read_text())
