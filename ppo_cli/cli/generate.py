"""`ppo-cli generate`."""

from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ppo_cli.cli import completion, options

if TYPE_CHECKING:
    from ppo_cli.evaluation.generate import Request
    from ppo_cli.models.sampling_params import SamplingParams


class Format(StrEnum):
    """Format of the samples."""

    table = "table"
    text = "text"
    jsonl = "jsonl"


def generate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            autocompletion=completion.models,
            help="Run directories, model folders or hub ids.",
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Prompt (repeats). Default: This movie.",
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts in a file: .txt, .csv, .jsonl, .parquet ...; - for standard input.",
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    column: options.Column = "text",
    chat: options.Chat = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            help="With --chat: system prompt. Default: the run's.",
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Read prompts from the terminal, one a line; with --chat one conversation.",
            rich_help_panel=options.PROMPTS,
        ),
    ] = False,
    num_samples: Annotated[
        int,
        typer.Option(
            "-n",
            "--num-samples",
            metavar="N",
            min=1,
            max=10_000,
            help="Samples per prompt and model.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = 1,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="Length limit of a response, tokens.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = 30,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="X",
            help="Above 0; lower values sample likelier tokens.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="K",
            min=0,
            help="Sample from the k likeliest tokens; 0: off.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Nucleus sampling: above 0, up to 1 (off).",
            rich_help_panel=options.SAMPLING,
        ),
    ] = 1.0,
    seed: options.Seed = 0,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference/--no-reference",
            help="Also sample from the run's reference.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = False,
    score: Annotated[
        bool | None,
        typer.Option(
            "--score/--no-score",
            help="Score each sample. Default: if MODEL is a run directory.",
            rich_help_panel=options.SCORES,
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
            help="table, text or jsonl.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = Format.table,
    output: options.Output = None,
) -> int:
    """Generate text with tuned models, and score it.

    Examples:
        ppo-cli generate ppo-good --reference --prompt "This movie" -n 3
        ppo-cli generate ppo-good --prompts prompts.csv --format jsonl --output samples.jsonl
        ppo-cli generate ppo-good --interactive
    """
    from ppo_cli.cli.console import (
        busy,
        check_output,
        hush,
        note,
        print_tables,
        write_json,
        write_result,
    )
    from ppo_cli.cli.fast_imports import light_imports
    from ppo_cli.cli.reward_options import reward_lines
    from ppo_cli.errors import ConsentError, UsageError
    from ppo_cli.utils.text import escape_controls

    if not 1e-6 <= temperature <= 1e6:
        raise UsageError(
            f"--temperature is {temperature}: it must be above 0, from 1e-6 to 1e6, such as 0.7"
        )
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p is {top_p}: it must be above 0 and at most 1")
    if interactive:
        given = {
            "--prompt": prompt,
            "--prompts": prompts,
            "--output": output,
            "--reference": reference,
            "-n": num_samples > 1,
            "--format": format is not Format.table,
            "a second MODEL": models[1:],
        }
        if odd := [name for name, value in given.items() if value]:
            raise UsageError(f"--interactive answers one line at a time: leave out {odd[0]}")
    check_output(output, [*models, prompts, classifier])

    with busy():
        with light_imports():
            from ppo_cli.cli import requests
            from ppo_cli.evaluation.generate import generate as generate_samples
            from ppo_cli.evaluation.generate import load_classifier
            from ppo_cli.models.sampling_params import SamplingParams
        from ppo_cli.kernels.kernel_caches import limit_kernel_caches
        from ppo_cli.training.run_directory import RunDirectory

        hush()
    limit_kernel_caches()
    if score is None:
        is_scored = bool(classifier or reward)
        is_run = any(RunDirectory(model).is_run() for model in models)
        is_scored = is_scored or (is_run and not interactive)
    else:
        is_scored = score
    resolve = partial(
        requests.resolve,
        models,
        reference=reference,
        sentiment=sentiment,
        classifier=classifier,
        device=device,
        trusted=trust_remote_code or (),
        rewards=reward or (),
        chat=chat,
        system=system,
    )
    try:
        request = resolve(score=is_scored)
    except ConsentError as error:
        if score:
            raise
        note(f"no scores: {error}")
        request = resolve(score=False)
    note(*reward_lines(request.reward))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    if interactive:
        return _interact(request, params, max_new_tokens, seed)
    check_output(output, request.input_names)
    rows = requests.read_prompts(prompt or [], prompts, column, request.prompts)
    rows = rows or [requests.row_of("This movie", request.prompts)]
    scorer = load_classifier(request)
    results = []
    for source in request.sources:
        if len(request.sources) > 1:
            note(f"sampling from {source.name}")
        results.append(
            generate_samples(
                source,
                rows,
                samples_each=num_samples,
                max_new_tokens=max_new_tokens,
                seed=seed,
                device=request.device,
                reward=scorer,
                trusted=request.trusted,
                params=params,
                prompts=request.prompts,
            )
        )
    if format is Format.jsonl:
        write_json(
            *(
                {"model": result.model, **sample.as_dict()}
                for result in results
                for sample in result.samples
            ),
            output=output,
        )
    elif format is Format.text:
        lines = [
            escape_controls(sample.query + sample.gap + sample.response)
            for result in results
            for sample in result.samples
        ]
        write_result("\n".join(lines), output)
    else:
        from ppo_cli.reporting.tables import generated_texts

        print_tables([generated_texts(results, scorer is not None)], output)
    return 0


def _interact(request: "Request", params: "SamplingParams", max_new_tokens: int, seed: int) -> int:
    from ppo_cli.cli.interactive import converse
    from ppo_cli.evaluation.dialogue import Dialogue
    from ppo_cli.evaluation.generate import load_classifier, load_model

    chat = request.prompts if request.prompts.chat else None
    reward = load_classifier(request)
    dialogue = Dialogue(
        load_model(request.sources[0], request.device, request.trusted, chat),
        request.prompts,
        params,
        max_new_tokens=max_new_tokens,
        seed=seed,
        reward=reward,
    )
    return converse(dialogue, reward.label if reward else None, is_chat=chat is not None)
