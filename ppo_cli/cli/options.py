"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the sampling.")]
Sentiment = Annotated[
    str | None,
    typer.Option("--sentiment", help="Label to score. Default: the run's own."),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        "--classifier", help="Classifier: folder, hub id or 'embedded'. Default: the run's."
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code",
        metavar="MODEL",
        help="Run the code that this model brings along (repeats). Off for all others.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", help="Write there instead of to standard output."),
]
Column = Annotated[
    str, typer.Option("--column", help="Column of a file of prompts that has several.")
]
