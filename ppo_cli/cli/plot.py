"""`ppo-cli plot`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppo_cli.cli import completion

if TYPE_CHECKING:
    from ppo_cli.training.run_directory import RunDirectory


class Seeds(StrEnum):
    """How runs that differ in the seed alone are drawn."""

    range = "range"
    se = "se"
    each = "each"


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
    seeds: Annotated[
        Seeds | None,
        typer.Option(
            "--seeds",
            metavar="range|se|each",
            help="Runs that differ in the seed alone: their mean in a band from the lowest to the "
            "highest (range, the default) or of one standard error (se), or each as a curve.",
        ),
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic scale of the values.")] = False,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Title over the picture.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="A,B,...",
            help="Names in the legend, one for each curve. Default: what tells the runs apart.",
        ),
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
        ppo-cli plot tiny-0 tiny-1 tiny-2 --log
    """
    import csv
    from pathlib import Path

    from ppo_cli.cli.console import check_output, write_result
    from ppo_cli.reporting.plots import DEFAULT_METRICS, plot_training
    from ppo_cli.training.run_directory import RunDirectory
    from ppo_cli.training.run_list import seed_groups

    if terminal:
        _refuse(
            "prints a table of each run" if frontier else "writes no file and draws no band",
            "--terminal",
            {"--output": output, "--seeds se": seeds is Seeds.se}
            | ({"--seeds": seeds, "--title": title, "--labels": labels} if frontier else {}),
        )
    if frontier:
        _refuse(
            "draws eval/score against eval/kl, each evaluation as it is",
            "--frontier",
            {"--metric": metric, "--smooth": smooth, "--log": log, "--seeds se": seeds is Seeds.se},
        )
    directories = [RunDirectory.existing(run) for run in dict.fromkeys(runs)]
    groups = [[d] for d in directories] if seeds is Seeds.each else seed_groups(directories)
    look: dict[str, Any] = {
        "groups": [[str(directory.path) for directory in group] for group in groups],
        "labels": next(csv.reader([" ".join(labels.split())])) if labels is not None else None,
    }
    if frontier:
        _plot_frontier(directories, output, terminal, look | {"title": title})
        return
    metrics = tuple(dict.fromkeys(metric or DEFAULT_METRICS))
    records = {str(directory.path): directory.records.metrics() for directory in directories}
    if terminal:
        _print_charts(records, metrics, title, look | {"smooth": smooth or 1, "log": log})
        return
    target = Path(output) if output else directories[0].plot
    check_output(str(target), runs, allowed=[directory.plot for directory in directories])
    look |= {"title": title, "log": log, "band": "se" if seeds is Seeds.se else "range"}
    plot_training(records, target, metrics, smooth, **look)
    write_result(str(target), None)


def _refuse(what: str, option: str, others: dict[str, Any]) -> None:
    """Raise `UsageError` where an option that does `what` leaves no use for another."""
    from ppo_cli.errors import UsageError

    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{option} {what}: leave {' and '.join(given)} out")


def _print_charts(
    records: dict[str, Any], metrics: "tuple[str, ...]", title: str | None, look: dict[str, Any]
) -> None:
    from rich.text import Text

    from ppo_cli.cli.console import console, write_result
    from ppo_cli.reporting.terminal_chart import terminal_chart
    from ppo_cli.utils.text import escape_controls

    screen = console(stderr=False)
    ascii_only = screen.options.ascii_only
    charts = [
        terminal_chart(records, metric, screen.width, ascii_only=ascii_only, **look)
        for metric in metrics
    ]
    lines = [Text(escape_controls(title)), Text()] if title else []
    lines += [line for chart in charts for line in [*chart, Text()]][:-1]
    if screen.is_terminal:
        screen.print(*lines, sep="\n", soft_wrap=True)
    else:
        write_result("\n".join(line.plain.rstrip() for line in lines), None)


def _plot_frontier(
    directories: "list[RunDirectory]", output: str | None, terminal: bool, look: dict[str, Any]
) -> None:
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
        frontier.plot_frontier(trails, curve, target, **look)
        write_result(str(target), None)
    if curve is None:
        note(f"without best-of-n, the curve to beat: {frontier.HOW_TO_GET_IT}")
