"""Experiment trackers, through accelerate: what each is started with, and what it is sent.

Numbers go to every tracker. Histograms and tables go to those of `_SENDERS`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.config.secrets import without_secret_values
from ppo_cli.config.trackers import as_names, check_installed
from ppo_cli.errors import PPOCliError, UsageError
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.utils.hub import first_line
from ppo_cli.utils.text import escape_controls, markdown_text

STEP = "step"
"""The key of the step's number in wandb, which numbers its rows itself."""


@dataclass(frozen=True)
class Table:
    """Samples of a step: a name, columns, and a list of values a row."""

    name: str
    columns: list[str]
    rows: list[list[Any]]

    def escaped(self, escape: Callable[[str], str]) -> list[list[Any]]:
        """The rows, with `escape` applied to each text: it comes from a model and from data."""
        return [[escape(v) if isinstance(v, str) else v for v in row] for row in self.rows]


def check_trackers(settings: PPOSettings) -> None:
    """Check that the trackers of `log_with` are installed and that all arguments are theirs.

    Raises:
        MissingPackageError: a package is missing.
        UsageError: `tracker_kwargs` has arguments of another tracker.
    """
    names = as_names(settings.log_with)
    check_installed(names)
    if names and (others := [key for key in settings.tracker_kwargs if key not in names]):
        raise UsageError(
            f"ppo.tracker_kwargs: '{others[0]}' is not the tracker (ppo.log_with: "
            f"{', '.join(names)}): put its arguments under '{names[0]}'"
        )


def check_logging_dir(config: PPOConfig) -> None:
    """Raise `UsageError` where a tracker needs a folder and none is configured."""
    if not ({"logging_dir", "project_dir"} & set(config.project_kwargs)) and (
        not config.accelerator_kwargs.get("project_dir")
    ):
        for name in {"tensorboard", "aim"}.intersection(as_names(config.log_with)):
            raise UsageError(
                f"ppo.log_with={name} needs a folder to write to: set "
                "'ppo.project_kwargs={logging_dir: FOLDER}'"
            )


def start_trackers(accelerator: Accelerator, config: PPOConfig) -> None:
    """Start the trackers of a `PPOTrainer` and log its configuration, without secrets.

    Raises:
        PPOCliError: a tracker does not start.
    """
    values = {k: v for k, v in config.to_dict().items() if v is not None}
    with starting(" and ".join(as_names(config.log_with))), quietly():
        accelerator.init_trackers(config.tracker_project_name, init_kwargs=config.tracker_kwargs)
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                use_own_steps(tracker)
                tracker.store_init_configuration(
                    {"trl_ppo_trainer_config": without_secret_values(values)}
                )
            else:
                tracker.store_init_configuration(plain(without_secret_values(values)))


@contextmanager
def starting(name: str) -> Iterator[None]:
    """Around the start of a tracker.

    Raises:
        PPOCliError: it does not start.
    """
    try:
        yield
    except Exception as error:
        raise PPOCliError(
            f"ppo.log_with={name}: the tracker does not start: {first_line(error).rstrip('. ')}. "
            "Change ppo.tracker_kwargs or ppo.project_kwargs, or set ppo.log_with=null"
        ) from error


def quietly() -> redirect_stdout[io.StringIO]:
    """Around calls of trackers: standard output is for results, and trackio writes to it."""
    return redirect_stdout(io.StringIO())


def plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as flat ones, `section/key`: numbers, texts, and JSON for all else."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= plain(value, f"{prefix}{key}/")
        else:
            is_plain = isinstance(value, (bool, int, float, str))
            flat[prefix + key] = value if is_plain else json.dumps(value, default=str)
    return flat


def send(
    tracker: GeneralTracker,
    step: int,
    numbers: Mapping[str, float],
    arrays: Mapping[str, np.ndarray],
    table: Table | None,
) -> None:
    """Send a step to a tracker: numbers, and what it has of arrays (histograms) and the table."""
    with quietly():
        _SENDERS.get(tracker.name, _send_numbers)(tracker, step, dict(numbers), arrays, table)


def _send_numbers(
    tracker: Any, step: int, numbers: dict[str, Any], arrays: Any, table: Table | None
) -> None:
    tracker.log(numbers, step=step)


def _send_to_tensorboard(
    tracker: Any, step: int, numbers: dict[str, Any], arrays: Any, table: Table | None
) -> None:
    for key, values in arrays.items():
        tracker.writer.add_histogram(key, values, step)
    if table is not None:
        rows = [table.columns, ["---"] * len(table.columns), *table.escaped(markdown_text)]
        text = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
        tracker.writer.add_text(table.name, text, step)
    tracker.log(numbers, step=step)  # and flush


def _send_to_wandb(
    tracker: Any, step: int, numbers: dict[str, Any], arrays: Any, table: Table | None
) -> None:
    # wandb drops a row whose number is not above all earlier ones: where the user logs rows too,
    # where a step has two, in a run that goes back. So it numbers the rows itself.
    import wandb

    values: dict[str, Any] = {**numbers, STEP: step}
    values |= {key: wandb.Histogram(array) for key, array in arrays.items()}
    if table is not None:
        rows = table.escaped(escape_controls)
        values[table.name] = wandb.Table(columns=table.columns, data=rows)
    tracker.log(values)


def _send_to_trackio(
    tracker: Any, step: int, numbers: dict[str, Any], arrays: Any, table: Table | None
) -> None:
    import trackio

    values: dict[str, Any] = {**numbers}
    values |= {key: trackio.Histogram(array) for key, array in arrays.items()}
    if table is not None:
        rows = table.escaped(markdown_text)  # trackio renders Markdown
        values[table.name] = trackio.Table(columns=table.columns, data=rows)
    tracker.tracker.log(values, step=step)  # accelerate's own method drops the step in 1.10


def _send_to_mlflow(
    tracker: Any, step: int, numbers: dict[str, Any], arrays: Any, table: Table | None
) -> None:
    import mlflow

    tracker.log(numbers, step=step)
    if table is not None:  # `log_table` would list every file in one tag, which is bounded
        content = {"columns": table.columns, "data": table.escaped(escape_controls)}
        mlflow.log_dict(content, f"{table.name}/step-{step:06}.json")


_SENDERS: dict[str, Callable[..., None]] = {
    "tensorboard": _send_to_tensorboard,
    "wandb": _send_to_wandb,
    "trackio": _send_to_trackio,
    "mlflow": _send_to_mlflow,
}


def use_own_steps(tracker: Any) -> None:
    """Let wandb's charts have the number of the step on their axis, not that of the row."""
    tracker.tracker.define_metric(STEP)
    tracker.tracker.define_metric("*", step_metric=STEP)


def send_statistics(
    trackers: Sequence[GeneralTracker],
    step: int,
    stats: Mapping[str, Any],
    batch: Mapping[str, Any],
    scores: Tensor,
    columns: Sequence[str],
) -> None:
    """Send what `PPOTrainer.log_stats` gets, which has the other arguments.

    Raises:
        ValueError: with wandb, a column is not in the batch.
    """
    arrays = {k: np.asarray(v) for k, v in stats.items() if np.size(v) > 1}
    numbers = {k: np.asarray(v).item() for k, v in stats.items() if np.size(v) == 1}
    numbers["env/reward_mean"] = scores.mean().item()
    numbers["env/reward_std"] = scores.std().item() if len(scores) > 1 else 0.0
    arrays["env/reward_dist"] = scores.numpy()
    for tracker in trackers:
        table = None
        if tracker.name == "wandb":
            if missing := [column for column in columns if column not in batch]:
                raise ValueError(f"columns {missing} to log are not in the batch: {list(batch)}")
            texts = zip(*(batch[c] for c in columns), scores.tolist(), strict=True)
            table = Table("game_log", [*columns, "reward"], [list(row) for row in texts])
        send(tracker, step, numbers, arrays, table)
