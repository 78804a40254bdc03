"""`ppo-cli runs`."""

from typing import Annotated

import typer

from ppo_cli.cli import completion


def runs(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR | RUN RUN...]",
            autocompletion=completion.runs,
            help="Folder to search, four folders deep (default: this one), or runs to compare.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List run directories, or say how some of them differ.

    Examples:
        ppo-cli runs
        ppo-cli runs experiments --json
        ppo-cli runs ppo-good ppo-bad
    """
    from ppo_cli.cli.console import note, print_tables, write_json
    from ppo_cli.reporting.run_tables import difference_tables, run_table
    from ppo_cli.training.run_list import differences, find_runs, summarise

    if places and len(places) > 1:
        found = differences(places)
        if as_json:
            write_json(found.as_dict(), indent=2)
        else:
            print_tables(difference_tables(found))
        return
    folder = places[0] if places else "."
    summaries = [summarise(path) for path in find_runs(folder)]
    if as_json:
        write_json([summary.as_dict() for summary in summaries], indent=2)
    elif summaries:
        print_tables([run_table(summaries)])
    else:
        note(f"no run directories in {folder}: 'ppo-cli train' makes one")
