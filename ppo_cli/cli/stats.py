"""`ppo-cli stats`."""

from typing import Annotated

import typer

from ppo_cli.cli import completion


def stats(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", autocompletion=completion.runs, help="Run directory."),
    ] = None,
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
    explain: Annotated[
        list[str] | None,
        typer.Option(
            "--explain",
            metavar="KEY",
            autocompletion=completion.statistics,
            help="Say what this key means, and what is healthy (repeats). 'all' lists the keys. "
            "RUN may be left out.",
        ),
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
    """Show the statistics of a PPO step and what they mean, or follow a run that is being made.

    Examples:
        ppo-cli stats ppo-good --objective
        ppo-cli stats ppo-good --step 10 --json
        ppo-cli stats ppo-good --follow
        ppo-cli stats --explain objective/kl --explain distinct-2
    """
    from ppo_cli.cli.console import note, print_tables, write_json
    from ppo_cli.errors import UsageError
    from ppo_cli.evaluation.quality import explained_statistics
    from ppo_cli.ppo.statistics import grouped
    from ppo_cli.reporting import explanations
    from ppo_cli.training.run_directory import RunDirectory

    if explain and objective is not None:
        raise UsageError("--explain names its keys: leave --objective and --no-objective out")
    if follow:
        if explain:
            raise UsageError("--explain and --follow exclude each other: leave one of them out")
        _follow(_named(run), objective, step, as_json)
        return
    explained = explanations.explained(explain or ())
    if run is None:
        if not explain or step is not None:
            _named(run)
        number, values = None, {}
    else:
        rows = RunDirectory.existing(run).records.metrics()
        by_step = {row["step"]: row for row in rows}
        number = rows[-1]["step"] if step is None else step
        if number not in by_step:
            raise UsageError(
                f"{run} has no step {number}: it has {rows[0]['step']} to {rows[-1]['step']}"
            )
        values = by_step[number]
    if explain:
        if as_json:
            about = {key: explanations.as_dict(s, values.get(key)) for key, s in explained.items()}
            write_json(about, indent=2)
        else:
            print_tables(explanations.explanations(explained, values))
        return
    wanted = (True, False) if objective is None else (objective,)
    groups = {
        title: entries
        for half in wanted
        for title, entries in grouped(values, half, explained_statistics()).items()
    }
    if as_json:
        shown = {key: value for entries in groups.values() for key, value, _ in entries}
        write_json({"step": number, **shown}, indent=2)
        return
    from ppo_cli.reporting.tables import statistics_tables

    print_tables(statistics_tables(groups, f"{run}, step {number}"))
    note(explanations.POINTER)


def _named(run: str | None) -> str:
    from ppo_cli.errors import UsageError

    if run is None:
        raise UsageError("no RUN is named: give a run directory; 'ppo-cli runs' lists them")
    return run


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
