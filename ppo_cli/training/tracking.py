"""The trackers of a run: they get what the records get, and a resumed run continues in them.

`trackers.json` in the run directory holds what names the run in each tracker. A tracker that fails
ends no run: there is one warning, and its rows are sent again from `metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ppo_cli.config.schema import RunConfig
from ppo_cli.config.secrets import without_secret_values
from ppo_cli.config.trackers import as_names
from ppo_cli.evaluation.samples import Sample
from ppo_cli.ppo.trackers import Table, plain, quietly, send, starting, use_own_steps
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils.files import write_text
from ppo_cli.utils.hub import first_line
from ppo_cli.utils.inventory import LOGS, TRACKERS_FILE
from ppo_cli.utils.text import escape_controls

MAX_SHARE_OF_FAILURES = 0.1  # of a run's time that may go by in calls of a tracker that fails
FLAT = ("tensorboard", "mlflow")  # these take no nested configuration
Row = Mapping[str, float]


class RunTrackers:
    """The trackers that `ppo.log_with` names, for the run in `directory`.

    Args:
        config: the run's.
        directory: of the run; holds `trackers.json` and, unless configured otherwise, the logs.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config
        self._directory = directory
        project = config.ppo.project_kwargs
        given = project.get("logging_dir") or project.get("project_dir")
        self._is_in_run = given is None
        self._logs = Path(os.path.abspath(given or directory.path / LOGS))
        self._open: dict[str, Any] = {}
        self._known: dict[str, dict[str, Any]] = {}  # as in the file
        self._sent: dict[str, dict[int, Collection[str]]] = {}  # tracker -> step -> keys
        self._retry_at: dict[str, float] = {}
        self._warned: set[str] = set()

    def start(self, rows: Sequence[Row] = (), step: int = 0) -> None:
        """Start each tracker, or let it continue.

        Args:
            rows: the metrics that the run had so far, those after its newest checkpoint too.
            step: of that checkpoint. A tracker that is new to the run gets the rows up to it.

        Raises:
            PPOCliError: a tracker does not start.
        """
        names = as_names(self._config.ppo.log_with)
        if not names:
            return
        self._known = self._read()
        self._directory.inventory.add([TRACKERS_FILE, *([f"{LOGS}/"] if self._is_in_run else [])])
        last = max((int(row["step"]) for row in rows), default=0)
        for name in self._known.keys() - names:  # it misses what follows
            self._known[name].setdefault("unsent_from", last + 1)
        for name in names:
            was = self._known.get(name)
            end = 0 if was is None else was.pop("unsent_from", float("inf"))
            if name == "tensorboard":
                end = min(end, step + 1)  # it can drop the steps that are made again
            self._sent[name] = {int(row["step"]): row.keys() for row in rows if row["step"] < end}
            identity = was or _new_identity(name, self._directory.path.resolve().name)
            with starting(name), quietly():
                self._open[name] = self._started(name, identity, was is not None)
            self._known[name] = identity | _identity_of(name, self._open[name])
            self._write()
            for row in rows:
                if row["step"] <= step and row["step"] not in self._sent[name]:
                    self._send(name, row, {}, None)

    def log(self, row: Row, arrays: Mapping[str, np.ndarray], samples: Sequence[Sample]) -> None:
        """Send a step to every tracker, or what was added to its row of the metrics.

        Args:
            row: the step's line of the metrics, or a part of it, with its `step`.
            arrays: for histograms, where a tracker has them.
            samples: for a table, where a tracker has them.
        """
        table = None
        if samples:
            records = [sample.as_dict() for sample in samples]
            columns = [*dict.fromkeys(key for record in records for key in record)]
            table = Table("samples", columns, [[r.get(key) for key in columns] for r in records])
        for name in self._open:
            sent = self._sent[name].get(int(row["step"]), ())
            if new := {key: value for key, value in row.items() if key not in sent}:
                self._send(name, {**new, "step": row["step"]}, arrays, table)

    def roll_back(self, step: int) -> None:
        """Go back to `step`: what follows it is made, and sent, again.

        TensorBoard drops what it had; in the other trackers the later of two rows of a step is the
        run's.
        """
        for name, tracker in self._open.items():
            self._sent[name] = {}
            if "unsent_from" in self._known[name]:
                first = self._known[name]["unsent_from"]
                self._known[name]["unsent_from"] = min(first, step + 1)
            if name == "tensorboard":
                tracker.finish()
                tracker.init_kwargs["purge_step"] = step + 1
                tracker.start()

    def finish(self) -> None:
        """End the trackers; a failure is a warning."""
        self._retry_at.clear()
        for name, tracker in self._open.items():
            self._send_missing(name)
            try:
                with quietly():
                    tracker.finish()
                    if name == "trackio":  # which otherwise ends it once more, at exit
                        _forget_trackio_run()
            except Exception as error:
                self._warn(name, error, "its last rows may not have arrived")
        self._open = {}

    def viewers(self) -> list[str]:
        """Commands that show what trackers wrote on this machine."""
        logs, project = self._logs, self._config.ppo.tracker_project_name
        if logs.is_relative_to(Path.cwd()):
            logs = logs.relative_to(Path.cwd())
        commands = {
            "tensorboard": f"tensorboard --logdir {shlex.quote(str(logs))}",
            "trackio": f"TRACKIO_DIR={shlex.quote(os.environ.get('TRACKIO_DIR', ''))} "
            f"trackio show --project {shlex.quote(project)}",
        }
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            store = shlex.quote(_mlflow_store(self._logs / "mlflow"))
            commands["mlflow"] = f"mlflow ui --backend-store-uri {store}"
        return [commands[n] for n in as_names(self._config.ppo.log_with) if n in commands]

    def _started(self, name: str, identity: Mapping[str, Any], continues: bool) -> Any:
        """The tracker of accelerate, started; it has the configuration if it is new."""
        config = self._config.ppo
        given = config.tracker_kwargs.get(name, {})
        arguments = {**_arguments(name, identity, continues, self._logs), **given}
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            if self._sent[name]:
                arguments["purge_step"] = max(self._sent[name]) + 1
            run = name if self._is_in_run else self._directory.path.resolve().name
            tracker = kind(run, self._logs, **arguments)
        elif kind.requires_logging_directory:
            tracker = kind(config.tracker_project_name, self._logs, **arguments)
        else:
            tracker = kind(config.tracker_project_name, **arguments)
        tracker.start()
        if name == "wandb":
            use_own_steps(tracker)
        if not continues or name in ("wandb", "trackio"):  # these take it anew
            self._log_configuration(name, tracker)
        return tracker

    def _log_configuration(self, name: str, tracker: Any) -> None:
        values = without_secret_values(self._config.model_dump(mode="json"))
        if name == "tensorboard":
            _log_hyperparameters(tracker.writer, plain(values))
        elif name == "trackio":  # accelerate's way adds an entry of its own
            tracker.tracker.config.update(values)
        else:
            tracker.store_init_configuration(plain(values) if name in FLAT else values)

    def _send(
        self, name: str, row: Row, arrays: Mapping[str, np.ndarray], table: Table | None
    ) -> None:
        """Send a row, after those that could not be sent; a failure is one warning."""
        if not self._send_missing(name):
            return
        try:
            self._try(name, row, arrays, table)
        except Exception as error:
            self._known[name]["unsent_from"] = int(row["step"])
            self._write()
            self._warn(name, error, "the run goes on, and what is missing is sent later")

    def _send_missing(self, name: str) -> bool:
        """Send the rows of the metrics that could not be sent; whether all have arrived."""
        known = self._known[name]
        if "unsent_from" not in known:
            return True
        if time.monotonic() < self._retry_at.get(name, 0):
            return False
        try:
            for row in self._directory.records.rows():
                if row["step"] >= known["unsent_from"]:
                    self._try(name, row, {}, None)
                    known["unsent_from"] = row["step"] + 1
            del known["unsent_from"]
        except Exception:  # there was a warning when the first of them could not be sent
            return False
        finally:
            self._write()
        return True

    def _try(
        self, name: str, row: Row, arrays: Mapping[str, np.ndarray], table: Table | None
    ) -> None:
        """Send a row; if that fails, do not try again before long."""
        numbers = {key: value for key, value in row.items() if key != "step"}
        started = time.monotonic()
        try:
            send(self._open[name], int(row["step"]), numbers, arrays, table)
        except Exception:
            now = time.monotonic()
            self._retry_at[name] = now + (now - started) / MAX_SHARE_OF_FAILURES
            raise

    def _warn(self, name: str, error: Exception, outcome: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            problem = first_line(error).rstrip(". ")
            warnings.warn(f"the tracker {name} fails: {problem}; {outcome}", stacklevel=4)

    def _read(self) -> dict[str, dict[str, Any]]:
        """What `trackers.json` holds; nothing where it is absent or damaged."""
        try:
            content = json.loads((self._directory.path / TRACKERS_FILE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        known = content.items() if isinstance(content, dict) else ()
        return {name: value for name, value in known if isinstance(value, dict)}

    def _write(self) -> None:
        text = json.dumps(self._known, indent=2) + "\n"
        write_text(self._directory.path / TRACKERS_FILE, text)


def _new_identity(name: str, run: str) -> dict[str, Any]:
    """What names a new run in a tracker, as far as it can be chosen."""
    key = secrets.token_hex(4)
    if name in ("wandb", "swanlab"):
        return {"id": key, "name": run}
    return {"name": f"{run}-{key}" if name == "trackio" else run}


def _identity_of(name: str, tracker: Any) -> dict[str, Any]:
    """What names a run in a tracker that chose it itself."""
    run = tracker.tracker
    if name == "mlflow":
        return {"id": run.info.run_id}
    if name == "wandb":
        return {"id": run.id}
    if name == "trackio":
        return {"name": run.name}
    if name == "aim":
        return {"id": run.hash}
    if name == "comet_ml":
        return {"id": run.get_key()}
    return {"id": run.id} if name == "clearml" else {}


def _arguments(
    name: str, identity: Mapping[str, Any], continues: bool, folder: Path
) -> dict[str, Any]:
    """Keyword arguments with which a tracker begins a run, or continues it."""
    run, key = identity.get("name"), identity.get("id")
    if name == "wandb":
        folder.mkdir(parents=True, exist_ok=True)  # else it writes to a temporary folder
        return {"id": key, "name": run, "resume": "allow", "dir": str(folder)}
    if name == "swanlab":
        resume = "allow" if continues else "never"
        return {"id": key, "experiment_name": run, "resume": resume, "logdir": str(folder / name)}
    if name == "trackio":
        # It reads the place of its store when it is imported.
        os.environ["TRACKIO_DIR"] = os.environ.get("TRACKIO_DIR") or str(folder / name)
        return {"name": run, "resume": "allow" if continues else "never", "embed": False}
    if name == "mlflow":
        names = {"run_id": key} if continues else {"run_name": run}
        return {**names, **_place_mlflow_store(folder / name)}
    if name == "dvclive":
        return {"dir": str(folder / name), "resume": continues}
    own = {"aim": "run_hash", "comet_ml": "experiment_key", "clearml": "continue_last_task"}
    return {own[name]: key} if name in own and continues else {}


def _place_mlflow_store(folder: Path) -> dict[str, Any]:
    """Let mlflow write into `folder`, unless MLFLOW_TRACKING_URI names another place.

    Returns:
        Arguments of accelerate's tracker: where files such as tables go.
    """
    import logging

    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    if find_spec("sqlalchemy") is None:
        raise ValueError(
            "mlflow-skinny has no store of its own: set MLFLOW_TRACKING_URI to that of a server, "
            "or install mlflow"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(_mlflow_store(folder))
    return {"logging_dir": (folder / "artifacts").as_uri()}


def _mlflow_store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _log_hyperparameters(writer: Any, values: dict[str, Any]) -> None:
    """Write the configuration as text, and for TensorBoard's page of hyperparameters."""
    lines = (f"    {key}: {escape_controls(str(value))}" for key, value in values.items())
    writer.add_text("configuration", "\n".join(lines), 0)
    if type(writer).__module__.startswith("torch."):  # `add_hparams` would make another run
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, {"env/reward_mean": 0.0, "objective/kl": 0.0}):
            writer.file_writer.add_summary(summary)


def _forget_trackio_run() -> None:
    from trackio import context_vars

    context_vars.current_run.set(None)
