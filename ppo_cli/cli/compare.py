"""`ppo-cli compare`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ppo_cli.cli import completion, options

if TYPE_CHECKING:
    from ppo_cli.evaluation.generate import Request
    from ppo_cli.reporting.comparison_page import PageDetails

GAP_NOT_REACHED = 3


class Format(StrEnum):
    """Format of the comparison."""

    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL MODEL...",
            autocompletion=completion.models,
            help="Run directories, model folders or hub ids.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts. Default: the run's held-out prompts.",
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    column: options.Column = "text",
    chat: options.Chat = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            max=1_000_000,
            help="Number of prompts.",
            rich_help_panel=options.PROMPTS,
        ),
    ] = 32,
    rows: Annotated[
        int,
        typer.Option(
            "--rows",
            metavar="N",
            min=0,
            help="Texts to show: of the first prompts, of the largest gains and losses.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = 3,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="Length limit of a response, tokens. Default: the run's.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    seed: options.Seed = 0,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference/--no-reference",
            help="Also compare with the run's reference. KL is measured from it either way.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = True,
    best_of_n: Annotated[
        str | None,
        typer.Option(
            "--best-of-n",
            metavar="N,N...",
            help="Also compare with the best of n responses from the reference: 1,2,4,8,16.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    sentiment: options.Sentiment = None,
    classifier: options.Classifier = None,
    reward: options.Reward = None,
    device: options.Device = "auto",
    trust_remote_code: options.Trust = None,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="table, json, csv or markdown.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = Format.table,
    output: options.Output = None,
    html: Annotated[
        str | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write a report: one page with a verdict, charts, all responses.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    min_gap: Annotated[
        float | None,
        typer.Option(
            "--min-gap",
            metavar="X",
            help="Exit 3 unless the first mean score exceeds the second by X.",
            rich_help_panel=options.SCORES,
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON Schema of --format json.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
) -> int:
    """Compare models on the same prompts: scores, KL, diversity and fluency side by side.

    Examples:
        ppo-cli compare ppo-good
        ppo-cli compare ppo-good ppo-bad --samples 64 --html report.html
        ppo-cli compare ppo-good gpt2 --min-gap 0.5 --format json --output scores.json
    """
    import math

    from ppo_cli.cli.console import (
        busy,
        check_outputs,
        hush,
        note,
        print_tables,
        write_json,
        write_result,
    )
    from ppo_cli.cli.fast_imports import light_imports
    from ppo_cli.cli.reward_options import reward_lines
    from ppo_cli.errors import ConsentError, UsageError
    from ppo_cli.evaluation.best_of_n import parse_counts
    from ppo_cli.evaluation.comparison_result import json_schema

    if schema:
        write_result(json_schema(), output)
        return 0
    if not models:
        raise UsageError(
            "no MODEL is named: give two, or a run directory, which is compared with its reference"
        )
    if min_gap is not None and not math.isfinite(min_gap):
        raise UsageError(f"--min-gap is {min_gap}: a number is needed, such as 0.5")
    counts = [] if best_of_n is None else parse_counts(best_of_n)
    outputs = {"--output": output, "--html": html}
    check_outputs(outputs, [*models, prompts, classifier])

    with busy():
        with light_imports():
            from ppo_cli.cli import requests
            from ppo_cli.evaluation.compare import compare as compare_models
            from ppo_cli.reporting import comparison_tables
        from ppo_cli.kernels.kernel_caches import limit_kernel_caches
        from ppo_cli.reporting.comparison_page import comparison_html
        from ppo_cli.reporting.explanations import POINTER

        hush()
    limit_kernel_caches()
    try:
        request = requests.resolve(
            models,
            reference=reference,
            score=True,
            sentiment=sentiment,
            classifier=classifier,
            device=device,
            trusted=trust_remote_code or (),
            rewards=reward or (),
            chat=chat,
        )
    except ConsentError as error:
        for recorded in filter(None, map(requests.recorded_scores, models)):
            error.add_note(recorded)
        raise
    note(*reward_lines(request.reward))
    check_outputs(outputs, request.input_names)
    texts = requests.read_prompts([], prompts, column, request.prompts)
    result = compare_models(
        request,
        texts,
        count=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        examples=rows,
        best_of=counts,
        progress=note,
    )
    if format is Format.table:
        print_tables(comparison_tables.comparison_tables(result, rows), output)
        note(POINTER)
    elif format is Format.json:
        write_json(result.as_dict(), output=output, indent=2)
    elif format is Format.csv:
        write_result(comparison_tables.comparison_csv(result), output)
    else:
        write_result(comparison_tables.comparison_markdown(result), output)
    if html is not None:
        own_score = request.is_reward_of_run and sentiment is None
        write_result(comparison_html(result, _page_details(models, request, own_score)), html)
    if min_gap is not None and not result.gap >= min_gap:
        names = [model.model for model in result.models[:2]]
        note(f"{names[0]} exceeds {names[1]} by {result.gap:.3f}, less than --min-gap {min_gap:g}")
        return GAP_NOT_REACHED
    return 0


def _page_details(models: list[str], request: "Request", own_score: bool) -> "PageDetails":
    """What the report has from the run directories among the models, and its settings.

    Evaluations during training and best-of-n of a run are left out where they are of another score
    than the one that is compared. What is damaged is noted and left out.

    Args:
        models: as they were named.
        request: made from them.
        own_score: whether the first run's reward scores the responses.
    """
    import shlex
    import sys
    from datetime import date

    from ppo_cli.cli.console import note
    from ppo_cli.errors import UsageError, without_secrets
    from ppo_cli.reporting import frontier
    from ppo_cli.reporting.comparison_page import PageDetails
    from ppo_cli.training.provenance import code
    from ppo_cli.training.run_directory import RunDirectory

    runs, trails, curve = {}, [], None
    for directory in map(RunDirectory, dict.fromkeys(models)):
        if not directory.is_run():
            continue
        name = str(directory.path)
        try:
            runs[name] = directory.records.metrics()
            config = directory.config()
            if not own_score or request.run is None or config.reward != request.run.reward:
                continue
            curve = curve or frontier.read_curve([directory.path])
            if any(key in row for row in runs[name] for key in frontier.KEYS):
                trails.append(frontier.trail(name, runs[name], config.run))
        except UsageError as error:
            note(f"left out of the report: {error}")
    settings = {
        "Device": str(request.device),
        "Versions": ", ".join(f"{name} {version}" for name, version in code()["versions"].items()),
        "Command": without_secrets(shlex.join(["ppo-cli", *sys.argv[1:]])),
        "Written on": date.today().isoformat(),
    }
    return PageDetails(runs, trails, curve, settings)
