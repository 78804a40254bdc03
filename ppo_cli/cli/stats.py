"""`ppo-cli stats`."""

from __future__ import annotations

from typing import Annotated

import typer


def stats(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    objective: Annotated[
        bool | None,
        typer.Option(
            "--objective/--no-objective",
            help="Those that concern the optimised losses, or the others. Default: both.",
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", min=1, help="Step to show. Default: the last."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show what a PPO step returned."""
    import json

    from ppo_cli.cli.console import console, write_result
    from ppo_cli.errors import UsageError
    from ppo_cli.ppo.statistics import grouped
    from ppo_cli.run_directory import RunDirectory

    rows = RunDirectory.existing(run).metrics()
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
        for title, entries in grouped(by_step[number], half).items()
    }
    if as_json:
        values = {key: value for entries in groups.values() for key, value, _ in entries}
        write_result(json.dumps({"step": number, **values}, indent=2), None)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"{run}, step {number}", style="italic"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("statistic", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning", style="dim")
    for title, entries in groups.items():
        table.add_row(Text(title, style="bold"), "", "")
        for n, (key, value, meaning) in enumerate(entries):
            table.add_row(f"  {key}", f"{value:.5g}", meaning, end_section=n == len(entries) - 1)
    console(stderr=False).print(table)
