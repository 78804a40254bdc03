"""`ppo-cli plot`."""

from __future__ import annotations

from typing import Annotated

import typer


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="KEY", help="Metric to draw (repeats). Default: loss, reward."
        ),
    ] = None,
    smooth: Annotated[
        int | None,
        typer.Option(
            "--smooth", min=1, metavar="W", help="Steps in the moving average; 1 for none."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", help=".png, .svg or .pdf. Default: training.png in the first run."
        ),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw in the terminal instead.")
    ] = False,
) -> None:
    """Draw loss and mean reward, or any other metric, of one or several runs."""
    from pathlib import Path

    from ppo_cli.cli.console import check_output, console, write_result
    from ppo_cli.plots import DEFAULT_METRICS, plot_training, terminal_chart
    from ppo_cli.run_directory import RunDirectory

    directories = [RunDirectory.existing(run) for run in dict.fromkeys(runs)]
    metrics = tuple(metric or DEFAULT_METRICS)
    records = {str(directory.path): directory.metrics() for directory in directories}
    if terminal:
        width = console(stderr=False).width
        lines = [line for key in metrics for line in terminal_chart(records, key, width=width)]
        write_result("\n".join(lines).lstrip("\n"), None)
        return
    target = Path(output) if output else directories[0].plot
    check_output(str(target))
    plot_training(records, target, metrics, smooth)
    write_result(str(target), None)
