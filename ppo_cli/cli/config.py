"""`ppo-cli config`."""

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from ppo_cli.cli import completion


def config(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            autocompletion=completion.configurations,
            help="Name, YAML file or run directory. Default: list the names.",
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of a configuration.")
    ] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            autocompletion=completion.settings,
            help="Change a value (repeats).",
        ),
    ] = None,
) -> None:
    """Show a configuration with every key resolved.

    Examples:
        ppo-cli config
        ppo-cli config tiny --set ppo.init_kl_coef=0.1
        ppo-cli config --schema
    """
    from ppo_cli.cli.console import write_result
    from ppo_cli.config.loading import DEFAULT_CONFIG, load_config, shipped_configs
    from ppo_cli.config.schema import json_schema

    if schema:
        write_result(json_schema(), None)
    elif name is None:
        from ppo_cli.cli.console import print_tables
        from ppo_cli.reporting.layout import Explained

        abouts = {name: _about(path) for name, path in shipped_configs().items()}
        names = {name: f"{name} (default)" if name == DEFAULT_CONFIG else name for name in abouts}
        print_tables([Explained([(names[name], "", about) for name, about in abouts.items()])])
    else:
        write_result(load_config(name, assignments=assignments or ()).to_yaml(), None)


def _about(path: Path) -> str:
    """The first sentence of the comment at the top of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".") + "."
