"""`ppo-cli export`."""

from enum import StrEnum
from typing import Annotated

import typer

from ppo_cli.cli import completion, options


class Dtype(StrEnum):
    """Type of the exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=completion.runs, help="Run directory.")
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")],
    merged: Annotated[
        bool,
        typer.Option(
            "--merged/--adapter",
            rich_help_panel=options.OUTPUT,
            help="The whole model, or the adapter alone as peft saves it.",
        ),
    ] = True,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            rich_help_panel=options.OUTPUT,
            help="float32, bfloat16 or float16. Default: the run's.",
        ),
    ] = None,
    trl: Annotated[
        bool,
        typer.Option(
            "--trl",
            rich_help_panel=options.OUTPUT,
            help="Also put the value head where TRL up to 0.11 reads it: in the weights.",
        ),
    ] = False,
    trust_remote_code: options.Trust = None,
) -> None:
    """Write a run's model to a folder of its own, for transformers, peft or TRL.

    Examples:
        ppo-cli export ppo-good model
        ppo-cli export ppo-good model --dtype bfloat16
        ppo-cli export ppo-good adapter --adapter
    """
    from pathlib import Path

    from ppo_cli.cli.console import busy, hush, note
    from ppo_cli.training.run_directory import RunDirectory

    directory = RunDirectory.existing(run)

    with busy():
        import torch

        from ppo_cli.training.export import export_model

        hush()
    exported = export_model(
        directory,
        Path(folder),
        form="merged" if merged else "adapter",
        dtype=None if dtype is None else getattr(torch, dtype),
        for_trl=trl,
        trusted=trust_remote_code or (),
    )
    note(f"wrote {folder}: {_what(merged, trl)}. Load it with:")
    if exported.base is None:
        note(f"  {exported.loader}.from_pretrained({folder!r})")
    else:
        note(f"  base = {exported.loader}.from_pretrained({exported.base!r})")
        note(f"  PeftModel.from_pretrained(base, {folder!r})")


def _what(merged: bool, trl: bool) -> str:
    model = "the whole model" if merged else "the adapter"
    return f"{model}, tokenizer and value head{', also in the weights for TRL' if trl else ''}"
