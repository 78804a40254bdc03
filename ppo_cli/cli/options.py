"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of sampling.")]
Sentiment = Annotated[
    str | None,
    typer.Option("--sentiment", help="Label to score. Default: the run's."),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        "--classifier", help="Classifier: folder, hub id or 'embedded'. Default: the run's."
    ),
]
Reward = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="FILE.py:FUNCTION",
        help="Allow this function of the run's reward to run, or score with it instead (repeats).",
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code",
        metavar="MODEL",
        help="Run the code in this model's repository (repeats). Other models' code is not run.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", help="File to write. Default: standard output."),
]
Column = Annotated[
    str, typer.Option("--column", help="Column that holds the prompts, in a file with columns.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts are a user's messages, or conversations. Default: as in the run.",
    ),
]
