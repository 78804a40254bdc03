"""Options that several commands share, and the groups of options in their help."""

from __future__ import annotations

from typing import Annotated

import typer

from ppo_cli.cli import completion

PROMPTS, SAMPLING, SCORES, OUTPUT = "Prompts", "Sampling", "Scores", "Output"
MACHINE = "Machine"

Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        autocompletion=completion.devices,
        help="auto, cpu, cuda, cuda:N or mps.",
        rich_help_panel=MACHINE,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**32 - 1,
        help="Seed of sampling.",
        rich_help_panel=SAMPLING,
    ),
]
Sentiment = Annotated[
    str | None,
    typer.Option(
        "--sentiment",
        metavar="LABEL",
        autocompletion=completion.labels,
        help="Label to score. Default: the run's.",
        rich_help_panel=SCORES,
    ),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        "--classifier",
        metavar="MODEL",
        autocompletion=completion.classifiers,
        help="Classifier: folder, hub id or embedded. Default: the run's.",
        rich_help_panel=SCORES,
    ),
]
Reward = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="FILE.py:FUNCTION",
        help="Allow this function of the run's reward to run, or score with it instead (repeats).",
        rich_help_panel=SCORES,
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code",
        metavar="MODEL",
        help="Run the code in this model's repository (repeats). Other models' code is not run.",
        rich_help_panel=MACHINE,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="File to write. Default: standard output.",
        rich_help_panel=OUTPUT,
    ),
]
Column = Annotated[
    str,
    typer.Option(
        "--column",
        metavar="NAME",
        help="Column that holds the prompts, in a file with columns.",
        rich_help_panel=PROMPTS,
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts are a user's messages, or conversations. Default: as in the run.",
        rich_help_panel=PROMPTS,
    ),
]
