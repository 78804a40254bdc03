"""`ppo-cli stats`."""

from typing import Annotated

import typer


def stats(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    objective: Annotated[
        bool | None,
        typer.Option(
            "--objective/--no-objective",
            help="Statistics of the optimised losses, or the others. Default: both.",
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", min=1, help="Step to show. Default: the last."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Show each step as another process makes it, until the run ends."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --follow one a step.")
    ] = False,
) -> None:
    """Show the statistics of a PPO step, or follow a run that is being made."""
    from ppo_cli.cli.console import print_tables, write_json
    from ppo_cli.errors import UsageError
    from ppo_cli.evaluation.quality import explained_statistics
    from ppo_cli.ppo.statistics import grouped
    from ppo_cli.training.run_directory import RunDirectory

    if follow:
        _follow(run, objective, step, as_json)
        return
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


def _follow(run: str, objective: bool | None, step: int | None, as_json: bool) -> None:
    from ppo_cli.cli.follow import follow
    from ppo_cli.errors import UsageError
    from ppo_cli.ppo.statistics import GROUPS

    if step is not None:
        raise UsageError("--step shows one step and --follow the newest: leave one of them out")
    keys = None
    if objective is not None:
        if not as_json:
            raise UsageError(
                "--objective and --no-objective choose among all statistics, and --follow shows a "
                "few of both: add --json, or leave them out"
            )
        keys = [prefix for prefixes in GROUPS[objective].values() for prefix in prefixes]
    follow(run, as_json=as_json, keys=keys)
