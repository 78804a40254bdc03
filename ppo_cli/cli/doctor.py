"""`ppo-cli doctor`."""

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say what this machine and installation have, and what is wrong with them.

    Examples:
        ppo-cli doctor
        ppo-cli doctor --json
    """
    from ppo_cli.cli.console import busy, print_tables, write_json
    from ppo_cli.reporting.machine_report import machine_tables
    from ppo_cli.training.doctor import examine

    with busy("looking at the machine and its packages"):
        report = examine()
    if as_json:
        write_json(report.as_dict(), indent=2)
    else:
        print_tables(machine_tables(report))
    return 0 if report.can_train else 1
