"""`ppo-cli plot`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ppo_cli.cli import completion

if TYPE_CHECKING:
    from ppo_cli.training.run_directory import RunDirectory


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", autocompletion=completion.runs, help="Run directories."),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="KEY",
            autocompletion=completion.metrics,
            help="Metric to draw (repeats). Default: loss, reward.",
        ),
    ] = None,
    smooth: Annotated[
        int | None,
        typer.Option("--smooth", min=1, metavar="W", help="Steps in the moving average; 1: none."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help=".png, .svg or .pdf. Default: training.png, with --frontier frontier.png, in the "
            "first run.",
        ),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw in the terminal instead.")
    ] = False,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Draw score against KL, one point per evaluation, with best-of-n from the "
            "reference if run.best_of_n measured it.",
        ),
    ] = False,
) -> None:
    """Draw loss and mean reward, or any other metric, of one or several runs.

    Examples:
        ppo-cli plot ppo-good ppo-bad --output both.png
        ppo-cli plot ppo-good --metric objective/kl --metric eval/score --terminal
        ppo-cli plot ppo-good --frontier
    """
    from pathlib import Path

    from ppo_cli.cli.console import check_output, console, write_result
    from ppo_cli.errors import UsageError
    from ppo_cli.reporting.plots import DEFAULT_METRICS, plot_training, terminal_chart
    from ppo_cli.training.run_directory import RunDirectory

    directories = [RunDirectory.existing(run) for run in dict.fromkeys(runs)]
    if frontier:
        if metric or smooth:
            raise UsageError(
                "--frontier draws eval/score against eval/kl, each evaluation as it is: leave "
                "--metric and --smooth out"
            )
        _plot_frontier(directories, output, terminal)
        return
    metrics = tuple(metric or DEFAULT_METRICS)
    records = {str(directory.path): directory.records.metrics() for directory in directories}
    if terminal:
        screen = console(stderr=False)
        ascii_only = screen.options.ascii_only
        charts = [terminal_chart(records, m, screen.width, ascii_only=ascii_only) for m in metrics]
        lines = [line for chart in charts for line in chart]
        write_result("\n".join(lines).lstrip("\n"), None)
        return
    target = Path(output) if output else directories[0].plot
    check_output(str(target), runs, allowed=[directory.plot for directory in directories])
    plot_training(records, target, metrics, smooth)
    write_result(str(target), None)


def _plot_frontier(directories: "list[RunDirectory]", output: str | None, terminal: bool) -> None:
    from pathlib import Path

    from ppo_cli.cli.console import check_output, note, print_tables, write_result
    from ppo_cli.reporting import frontier
    from ppo_cli.reporting.tables import frontier_table

    target = Path(output) if output else directories[0].path / frontier.PICTURE
    if not terminal:
        pictures = [run.path / frontier.PICTURE for run in directories]
        check_output(str(target), [str(run.path) for run in directories], allowed=pictures)
    trails = [
        frontier.trail(str(run.path), run.records.metrics(), run.config().run)
        for run in directories
    ]
    curve = frontier.read_curve([run.path for run in directories])
    if terminal:
        print_tables([frontier_table(trail, curve) for trail in trails])
    else:
        frontier.plot_frontier(trails, curve, target)
        write_result(str(target), None)
    if curve is None:
        note(f"without best-of-n, the curve to beat: {frontier.HOW_TO_GET_IT}")
