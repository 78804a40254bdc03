"""A run in a notebook: its display, and `ppo_cli.train`."""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_cli.cli.display import (
    SHOWN_SAMPLES,
    Display,
    RemainingTime,
    ShownEvaluation,
    evaluation_figures,
    score_of,
    step_figures,
)
from ppo_cli.evaluation.samples_html import samples_html
from ppo_cli.reporting.plots import DEFAULT_METRICS, plot_training
from ppo_cli.reporting.summary import StepReport, TrainingSummary
from ppo_cli.utils.html import page, table, text

MIN_INTERVAL = 0.25  # seconds between two updates of the text


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook: Jupyter, VS Code, Colab."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def train(
    config: str | Path = "tiny",
    settings: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    trust_remote_code: Collection[str] = (),
) -> TrainingSummary:
    """Make a run as `ppo-cli train` does, with a display that suits a notebook.

    An interrupt (Ctrl-C, the stop button) ends the run after the step that it is making; a second
    one ends it at once. `ppo-cli train --output RUN --resume` continues it.

    Args:
        config: name of a configuration that ships, or a YAML file.
        settings: values by dotted key, such as `{"run.steps": 20}`.
        overwrite: replace the run directory if it holds a run.
        quiet: show nothing.
        trust_remote_code: models whose own code may run.

    Returns:
        What the run has come to; its `run` is the run directory.

    Raises:
        PPOCliError: the request is wrong, or the run failed.
        Interrupted: by a second interrupt.
    """
    from ppo_cli.cli.console import hush
    from ppo_cli.cli.display import make_display
    from ppo_cli.cli.train import StopSignals, run
    from ppo_cli.config.loading import as_assignments, load_config
    from ppo_cli.kernels.switch import configured
    from ppo_cli.training.build import build_training

    found = load_config(str(config), assignments=as_assignments(settings or {}))
    hush()
    with configured(found.policy.kernels), StopSignals(quiet) as stop:
        training = build_training(
            found,
            overwrite=overwrite,
            trusted=trust_remote_code,
            consented=found.reward.foreign,
        )
        return run(training, make_display(quiet), stop)


class NotebookDisplay:
    """Two outputs of a cell that are replaced in place: text, and curves after each evaluation."""

    def __init__(self) -> None:
        self._remaining = RemainingTime()
        self._text, self._picture = _Output(), _Output()
        self._report: StepReport | None = None
        self._evaluation: ShownEvaluation | None = None
        self._left, self._status = "-:--", ""
        self._rows: list[dict[str, float]] = []
        self._shown_at = -MIN_INTERVAL

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._status = ""
        self._show_text()
        self._show_picture()

    def status(self, message: str) -> None:
        """Show a line below the statistics, until the next step."""
        self._status = message
        self._show_text()

    def show(self, report: StepReport) -> None:
        """Show a step; steps that follow at once are left out of the text, but the last."""
        self._report, self._status = report, ""
        self._left = self._remaining.after(report)
        self._rows = [row for row in self._rows if row["step"] < report.step]  # after a rollback
        self._rows.append({"step": report.step, **report.stats})
        if (evaluation := ShownEvaluation.of(report)) is not None:
            self._evaluation = evaluation
        if time.monotonic() - self._shown_at >= MIN_INTERVAL:
            self._show_text()
        if evaluation is not None:
            self._show_picture()

    def _show_text(self) -> None:
        self._shown_at = time.monotonic()
        self._text.show({"text/html": self._html(), "text/plain": self._plain()})

    def _html(self) -> str:
        parts = []
        if (report := self._report) is not None:
            share = report.step / report.steps
            bar = f'<progress value="{share:.4f}" style="width:100%;max-width:30em"></progress>'
            parts = [bar, _figures_html(step_figures(report, score_of(self._rows[0])))]
            if self._evaluation is not None:
                parts.append(_figures_html(evaluation_figures(self._evaluation)))
            parts.append(samples_html(report.samples, SHOWN_SAMPLES))
        if self._status:
            parts.append(text(self._status, dim=True))
        return page(self._plain(), *parts)

    def _plain(self) -> str:
        if (report := self._report) is None:
            return self._status or "the run has made no step"
        return f"step {report.step}/{report.steps}, {self._left} left"

    def _show_picture(self) -> None:
        rows = [row for row in self._rows if row.keys() >= set(DEFAULT_METRICS)]
        if rows:
            self._picture.show({"image/png": _png(rows), "text/plain": "loss and mean score"})


class _Output:
    """An output of a cell: shown once, then replaced."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, content: dict[str, str]) -> None:
        """Show `content`, one text for each MIME type, in place of what was there."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _figures_html(figures: dict[str, str]) -> str:
    return table([[*map(text, figures.values())]], [text(name, dim=True) for name in figures], "r")


def _png(rows: Sequence[dict[str, float]]) -> str:
    with tempfile.TemporaryDirectory(prefix="ppo-cli-") as folder:
        picture = Path(folder) / "training.png"
        plot_training({"run": rows}, picture)
        return base64.b64encode(picture.read_bytes()).decode()
