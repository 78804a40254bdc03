"""`ppo-cli init`."""

import dataclasses
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppo_cli.cli import completion

if TYPE_CHECKING:
    from ppo_cli.config.starting import Answers

DEFAULT_FILE = "ppo.yaml"
CHOICES, FILE = "Choices", "File"


def init(
    file: Annotated[
        str,
        typer.Argument(
            metavar="[FILE]", help=f"File to write; - for standard output. Default: {DEFAULT_FILE}."
        ),
    ] = DEFAULT_FILE,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            autocompletion=completion.classifiers,
            help="Model to tune: folder, hub id or embedded.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="DATA",
            help="Texts: file, folder, dataset on the hub or embedded.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", metavar="NAME", help="Column of the texts.", rich_help_panel=CHOICES
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            metavar="MODEL",
            autocompletion=completion.classifiers,
            help="Classifier: folder, hub id or embedded.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    sentiment: Annotated[
        str | None,
        typer.Option(
            "--sentiment",
            metavar="LABEL",
            autocompletion=completion.labels,
            help="Label to steer towards.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    adapter: Annotated[
        bool | None,
        typer.Option(
            "--adapter/--no-adapter", help="Train a low-rank adapter only.", rich_help_panel=CHOICES
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="Number of PPO steps.", rich_help_panel=CHOICES
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="DIR", help="Run directory.", rich_help_panel=CHOICES),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CONFIG",
            autocompletion=completion.configurations,
            help="Configuration that gives all other settings. Default: by the model.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            autocompletion=completion.settings,
            help="Any other value (repeats).",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    every_key: Annotated[
        bool,
        typer.Option(
            "--all",
            help="List all keys, those with their defaults in comments.",
            rich_help_panel=FILE,
        ),
    ] = False,
    ask: Annotated[
        bool,
        typer.Option(
            "--ask/--no-ask",
            help="At a terminal, ask for what no option gives.",
            rich_help_panel=FILE,
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.", rich_help_panel=FILE)
    ] = False,
) -> None:
    """Write a commented configuration for 'train --config'.

    Examples:
        ppo-cli init
        ppo-cli init my.yaml --model gpt2 --prompts reviews.csv --adapter --no-ask
        ppo-cli init - --from gpt2-imdb --all
    """
    from ppo_cli.cli.console import check_output, note, write_result
    from ppo_cli.config.starting import Answers, base_of, starting_config
    from ppo_cli.errors import UsageError

    target = None if file == "-" else file
    if target is not None and not target.endswith((".yaml", ".yml")):
        raise UsageError(f"{file}: give the file a name that ends in .yaml")
    check_output(target)
    if target is not None and os.path.exists(target) and not overwrite:
        raise UsageError(f"{file} exists: give --overwrite to replace it, or another name")
    answers = Answers(model, prompts, column, reward, sentiment, bool(adapter), steps, output)
    if ask and sys.stdin.isatty() and sys.stderr.isatty():
        answers = _asked(answers, adapter, base)
    name = base or base_of(answers.model)
    text = starting_config(
        answers, name, assignments or [], file=target or DEFAULT_FILE, every_key=every_key
    )
    write_result(text, target)
    if target is not None:
        note("next:", f"  ppo-cli train --config {shlex.quote(target)} --dry-run")


def _asked(answers: "Answers", adapter: bool | None, base: str | None) -> "Answers":
    """`answers`, with those that are missing asked for at the terminal."""
    from ppo_cli.config.loading import read_config
    from ppo_cli.config.starting import EMBEDDED, base_of

    def asked(key: str, question: str, default: str, value: str | None) -> None:
        if value is None:
            given[key] = typer.prompt(question, default=default, err=True)

    given: dict[str, Any] = {}
    asked("model", "Model to tune (folder, hub id or 'embedded')", EMBEDDED, answers.model)
    model = given.get("model", answers.model)
    values = read_config(base or base_of(model))
    source = values.get("prompts", {}).get("source", EMBEDDED)
    asked("prompts", "Texts (file, folder, dataset or 'embedded')", source, answers.prompts)
    if given.get("prompts", answers.prompts) not in (EMBEDDED, source):
        asked("column", "Column of the texts", "text", answers.column)
    classifier = values.get("reward", {}).get("model", EMBEDDED)
    asked("reward", "Classifier (folder, hub id or 'embedded')", classifier, answers.reward)
    asked("sentiment", "Label to steer towards", "positive", answers.sentiment)
    if adapter is None and model != EMBEDDED:
        question = "Train a low-rank adapter only (needs peft)?"
        given["adapter"] = typer.confirm(question, default=False, err=True)
    return dataclasses.replace(answers, **given)
