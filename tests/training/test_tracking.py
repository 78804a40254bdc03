"""Trackers: their stores are read back and compared with `metrics.jsonl`."""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ppo_cli.config.loading import validate
from ppo_cli.config.trackers import PACKAGES
from ppo_cli.errors import PPOCliError, UsageError
from ppo_cli.evaluation.samples import Sample
from ppo_cli.training import tracking
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.tracking import RunTrackers
from tests import faults
from tests.conftest import SMALL_RUN
from tests.forked import ppo_cli

Stored = dict[str, list[tuple[int, float]]]
"""Metric -> step and value of each of its rows, in order."""


def recorded(run: Path) -> Stored:
    """The metrics of `metrics.jsonl`."""
    stored: Stored = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in row.keys() - {"step"}:
            stored[key].append((row["step"], row[key]))
    return stored


def in_tensorboard(folder: Path) -> tuple[Stored, Any]:
    """The scalars in TensorBoard's files, and its reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    keys = reader.Tags()["scalars"]
    return {key: [(e.step, e.value) for e in reader.Scalars(key)] for key in keys}, reader


def in_trackio(folder: Path) -> tuple[Stored, list[dict[str, Any]]]:
    """The numbers in trackio's store, and its rows."""
    with sqlite3.connect(folder / "trl.db") as store:
        found = store.execute("select step, metrics from metrics order by step, id").fetchall()
    rows = [{"step": step, **json.loads(metrics)} for step, metrics in found]
    stored: Stored = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                stored[key].append((row["step"], value))
    return stored, rows


def in_mlflow(store: str) -> tuple[Stored, Any, Any]:
    """The metrics in mlflow's store, its client and the run."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {k: [(m.step, m.value) for m in metrics] for k, metrics in history.items()}, client, run


def assert_same(stored: Stored, wanted: Stored, times: bool = False) -> None:
    """Check that all rows are there once; those that were made again may have other times."""
    assert stored.keys() == wanted.keys()
    for key, rows in wanted.items():
        assert [step for step, _ in stored[key]] == [step for step, _ in rows], key
        if not times and key.startswith(("time/", "perf/")):
            continue
        values = [value for _, value in rows]
        assert [value for _, value in stored[key]] == pytest.approx(values, rel=1e-6, abs=1e-9), key


def need(package: str) -> None:
    """Skip a test where a tracker's package is not installed."""
    if find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that fails in its fourth and is resumed from its second."""
    names = [name for name in ("tensorboard", "trackio", "mlflow") if find_spec(name)]
    if not names:
        pytest.skip("no tracker is installed")
    home = tmp_path_factory.mktemp("home")
    command = [
        "train", "--config", SMALL_RUN, "--output", "run", "--steps", 5, "--quiet",
        "--set", "run.checkpoint_every=0", "--set", "run.eval_every=2", "--set", "prompts.limit=48",
        "--set", "rollout.output_min_length=4", "--set", "rollout.output_max_length=8",
        "--track", ",".join(names),
    ]  # fmt: skip
    at_hand = partial(
        faults.surroundings,
        TRACKIO_DIR="",
        MLFLOW_ALLOW_FILE_STORE="true",
        MLFLOW_TRACKING_URI=(home / "mlruns").as_uri(),
    )
    failed = ppo_cli(*command, cwd=home, fault=partial(fail_in_fourth_step, at_hand))
    assert failed.code == 1 and "broken pipe" in failed.err, failed.err
    done = ppo_cli("train", "--output", "run", "--resume", "--quiet", cwd=home, fault=at_hand)
    assert done.code == 0, done.err
    assert "Trackio" not in done.out + failed.out
    return home / "run"


def fail_in_fourth_step(surroundings: Any) -> None:
    surroundings()
    faults.helper_leaves(4)


def test_tensorboard_has_the_metrics_once_and_more(run: Path) -> None:
    need("tensorboard")
    stored, reader = in_tensorboard(run / "logs" / "tensorboard")
    assert_same(stored, recorded(run), times=True)
    tags = reader.Tags()
    assert {"env/reward_dist", "ppo/policy/advantages"} <= set(tags["histograms"])
    # Of a step that was made again TensorBoard keeps both texts.
    assert {e.step for e in reader.Tensors("samples/text_summary")} == {1, 2, 3, 4, 5}
    (told,) = reader.Tensors("configuration/text_summary")
    assert "ppo/batch_size: 16" in str(told.tensor_proto.string_val[0])
    assert "_hparams_/experiment" in reader.summary_metadata


def test_trackio_has_the_metrics_once_and_more(run: Path) -> None:
    need("trackio")
    folder = run / "logs" / "trackio"
    stored, rows = in_trackio(folder)
    assert_same(stored, recorded(run))
    assert rows[0]["env/reward_dist"]["_type"] == "trackio.histogram"
    columns = {"query", "response", "score", "probability", "reward"}
    assert set(rows[0]["samples"]["_value"][0]) == columns
    with sqlite3.connect(folder / "trl.db") as store:
        ((config,),) = store.execute("select config from configs").fetchall()
    assert json.loads(config)["ppo"]["batch_size"] == 16


def test_mlflow_has_the_metrics_once_and_more(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    stored, client, found = in_mlflow((run.parent / "mlruns").as_uri())
    assert_same(stored, recorded(run))
    assert found.data.params["ppo/batch_size"] == "16"
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert len(client.list_artifacts(found.info.run_id, "samples")) == 5


# ------------------------------------------------------------------ without a training run


class Recorder:
    """A tracker that keeps what it is sent, and fails when it is told to."""

    name = "clearml"  # one that gets numbers alone
    requires_logging_directory = False
    rows: list[tuple[int, dict[str, float]]]
    configuration: dict[str, Any]

    def __init__(self, project: str, **arguments: Any) -> None:
        self.arguments = arguments
        self.fails: Callable[[], None] | None = None
        type(self).rows = []

    @property
    def tracker(self) -> Any:
        return type("Run", (), {"id": "task-1"})

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        type(self).configuration = values

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails is not None:
            self.fails()
            raise ConnectionError("the network is down")
        self.rows.append((step, values))

    def finish(self) -> None:
        pass


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run directory; the tracker clearml is a `Recorder`."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "clearml", Recorder)
    folder = tmp_path / "run"
    folder.mkdir()
    return RunDirectory(folder)


def trackers_of(directory: RunDirectory, name: str = "clearml", **ppo: Any) -> RunTrackers:
    PartialState()
    return RunTrackers(validate({"ppo": {"log_with": name, **ppo}}), directory)


def make_step(trackers: RunTrackers, directory: RunDirectory, step: int, value: float) -> None:
    row = {"step": step, "loss": value}
    trackers.log(row, {"dist": np.array([value, 2.0])}, [Sample("a|b", "\x1b[1m", value, 0.5)])
    directory.records.append("metrics.jsonl", [row])


def test_all_of_accelerates_trackers_are_known_and_have_an_extra() -> None:
    tomllib = pytest.importorskip("tomllib")
    assert PACKAGES.keys() == LOGGER_TYPE_TO_CLASS.keys()
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert PACKAGES.keys() <= extras.keys()


def test_a_failing_tracker_is_warned_of_once_and_gets_its_rows_later(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]  # a step takes 5 s, a call that fails 1 s more
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    arrived = {1: 1, 2: 1, 3: 1, 4: 4, 5: 4, 6: 4}
    trackers = trackers_of(directory)
    trackers.start()
    tracker = trackers._open["clearml"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, rows in arrived.items():
            clock[0] += 5
            tracker.fails = partial(clock.__setitem__, 0, clock[0] + 1) if step in (2, 5) else None
            make_step(trackers, directory, step, step / 10)
            assert len(Recorder.rows) == rows
        stored = json.loads((directory.path / "trackers.json").read_text())
        assert stored["clearml"]["unsent_from"] == 5
        trackers.finish()
    assert [str(w.message) for w in caught] == [
        "the tracker clearml fails: the network is down; the run goes on, and what is missing is "
        "sent later"
    ]
    assert Recorder.rows == [(step, {"loss": step / 10}) for step in range(1, 7)]


def test_a_tracker_that_comes_later_gets_the_earlier_steps(directory: RunDirectory) -> None:
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    trackers = trackers_of(directory)
    trackers.start(rows, 2)
    make_step(trackers, directory, 3, 1.0)
    assert [step for step, _ in Recorder.rows] == [1, 2, 3]
    continued = trackers_of(directory)
    continued.start([*rows, {"step": 4, "loss": 1.0}], 3)
    make_step(continued, directory, 4, 1.0)  # which it has
    make_step(continued, directory, 5, 1.0)
    assert [step for step, _ in Recorder.rows] == [5]
    assert continued._open["clearml"].arguments == {"continue_last_task": "task-1"}
    trackers_of(directory, []).start(rows, 3)  # type: ignore[arg-type]


def test_secrets_stay_out_of_the_logged_configuration(directory: RunDirectory) -> None:
    kwargs = {"clearml": {"api_key": "abc", "tags": ["hf_abcdefghijklmnopqrstuvwxyz", "mine"]}}
    trackers_of(directory, tracker_kwargs=kwargs).start()
    logged = Recorder.configuration["ppo"]["tracker_kwargs"]["clearml"]
    assert logged == {"api_key": "***", "tags": ["***", "mine"]}


def test_a_tracker_that_does_not_start_is_an_error(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "start", lambda self: 1 / 0)
    with pytest.raises(PPOCliError, match=r"log_with=clearml: the tracker does not start: divis"):
        trackers_of(directory).start()


def test_the_folder_of_logs_belongs_to_the_run(directory: RunDirectory) -> None:
    logs = directory.path / "logs"
    logs.mkdir()
    with pytest.raises(UsageError, match=r"holds logs/, which the run would replace"):
        trackers_of(directory).start()
    logs.rmdir()
    trackers_of(directory).start()
    logs.mkdir()
    (logs / "events").touch()
    assert directory.inventory.strangers() == []
    directory.inventory.begin(())  # as --overwrite does
    assert os.listdir(directory.path) == ["ppo-cli.json"]


def start_without_a_login() -> None:
    def fail(*_: Any) -> None:
        raise PPOCliError("ppo.log_with=x: the tracker does not start: no login")

    RunTrackers.start = fail  # type: ignore[method-assign, assignment]


def test_a_run_whose_tracker_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    command = ["train", "--config", SMALL_RUN, "--output", "run", "--quiet"]
    done = ppo_cli(*command, cwd=tmp_path, fault=start_without_a_login)
    assert done.code == 1 and done.err.startswith("error: ppo.log_with=x: the tracker does not")
    RunDirectory(tmp_path / "run").check_writable(False, {})


def test_tensorboard_drops_what_a_rollback_makes_again(
    directory: RunDirectory, tmp_path: Path
) -> None:
    need("tensorboard")
    place = {"logging_dir": os.path.relpath(tmp_path / "elsewhere")}
    trackers = trackers_of(directory, "tensorboard", project_kwargs=place)
    trackers.start()
    for step in (1, 2, 3):
        make_step(trackers, directory, step, 0.1)
    trackers.roll_back(1)
    for step in (2, 3):
        make_step(trackers, directory, step, 0.5)
    trackers.finish()
    stored, reader = in_tensorboard(tmp_path / "elsewhere" / "run")
    assert [step for step, _ in stored["loss"]] == [1, 2, 3]
    assert [value for _, value in stored["loss"]] == pytest.approx([0.1, 0.5, 0.5])
    table = reader.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "a&#124;b" in table and "\x1b" not in table
    assert not (directory.path / "logs").exists()
