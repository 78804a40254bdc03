"""`ppo-cli stats`."""

from typing import Annotated

import typer

from ppo_cli.cli import completion


def stats(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=completion.runs, help="Run directory.")
    ],
    objective: Annotated[
        bool | None,
        typer.Option(
            "--objective/--no-objective",
            help="Statistics of the optimised losses, or the others. Default: both.",
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", min=1, help="Step to show. Default: the last."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the statistics of a PPO step."""
    from ppo_cli.cli.console import print_tables, write_json
    from ppo_cli.errors import UsageError
    from ppo_cli.evaluation.quality import explained_statistics
    from ppo_cli.ppo.statistics import grouped
    from ppo_cli.training.run_directory import RunDirectory

    rows = RunDirectory.existing(run).records.metrics()
    by_step = {row["step"]: row for row in rows}
    number = rows[-1]["step"] if step is None else step
    if number not in by_step:
        raise UsageError(
            f"{run} has no step {number}: it has {rows[0]['step']} to {rows[-1]['step']}"
        )
    wanted = (True, False) if objective is None else (objective,)
    groups = {
        title: entries
        for half in wanted
        for title, entries in grouped(by_step[number], half, explained_statistics()).items()
    }
    if as_json:
        values = {key: value for entries in groups.values() for key, value, _ in entries}
        write_json({"step": number, **values}, indent=2)
        return
    from ppo_cli.reporting.tables import statistics_tables

    print_tables(statistics_tables(groups, f"{run}, step {number}"))
