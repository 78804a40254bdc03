"""What a command's options ask for: which models, judged how, on which prompts."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ppo_cli.config.schema import RewardConfig, check_name
from ppo_cli.data.fingerprint import Inputs
from ppo_cli.data.sources import check_encodable, read_texts
from ppo_cli.errors import DataError, UsageError
from ppo_cli.evaluation.generate import REFERENCE, Request, Source
from ppo_cli.models.loading import check_trusted
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils.device import resolve_device
from ppo_cli.utils.text import shortened


def resolve(
    models: Sequence[str],
    *,
    reference: bool,
    score: bool,
    sentiment: str | None,
    classifier: str | None,
    device: str,
    trusted: Collection[str] = (),
) -> Request:
    """Find out what `models` are.

    A run directory names its reference and its classifier; for other models `classifier` does.
    What ends a response, `rollout.stop` of the first run directory, does for all of them.

    Args:
        models: run directories, model folders or hub ids.
        reference: also sample from the reference of the first run directory among them.
        score: whether a classifier is wanted.
        sentiment: label to score; None for the first run's own.
        classifier: hub id or folder; None for the first run's own.
        device: as `resolve_device` takes it.
        trusted: models, named as in `models` or a run's configuration, whose own code may run.

    Raises:
        UsageError: a classifier is needed and none is known, or `trusted` names no model here.
    """
    for what, name in [("model", model) for model in models] + [("--classifier", classifier)]:
        try:
            check_name("-" if name is None else name)
        except ValueError as error:
            raise UsageError(f"{what} '{shortened(str(name), 40)}' {error}") from error
    runs = [RunDirectory(model) for model in models if RunDirectory(model).is_run()]
    configs = [directory.config() for directory in runs]
    run = configs[0] if configs else None
    inputs = Inputs(runs[0].recorded().get("inputs")) if runs else None
    names = [str(Path(model)) if RunDirectory(model).is_run() else model for model in models]
    stop = tuple(run.rollout.stop) if run is not None else ()
    sources = [Source(name, model, None, stop) for name, model in zip(names, models, strict=True)]
    base = None
    if run is not None:
        base = Source(REFERENCE, run.policy.model, run.policy.revision, stop, inputs)
    if reference and base is not None:
        sources.append(base)
    reward = None
    if score:
        settings = run.reward if run is not None else RewardConfig()
        if classifier is not None:
            settings = RewardConfig(model=classifier, output=settings.output)
        elif run is None:
            raise UsageError(
                f"{models[0]} is no run directory, so it names no classifier: give one with "
                "--classifier (a folder, a hub id, or 'embedded'), or --no-score where there is one"
            )
        reward = settings.model_copy(
            update={"sentiment": settings.sentiment if sentiment is None else sentiment}
        )
    loaded = [source.model for source in sources]
    loaded += [reward.model] if reward else []
    loaded += [run.policy.model] if run else []
    check_trusted(trusted, loaded)
    return Request(sources, reward, run, resolve_device(device), trusted, base, inputs)


def read_prompts(prompts: Sequence[str], file: str | None, column: str = "text") -> list[str]:
    """Prompts given one by one, then those of a file (`-` for standard input, one a line).

    Raises:
        DataError: a prompt is empty, or the file is absent, empty or unreadable.
    """
    texts = list(prompts)
    for text in texts:
        check_encodable(text, "--prompt")
        if not text.strip():
            raise DataError("a prompt is empty: give some text to begin with")
    if file == "-":
        try:
            lines = [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError as error:
            raise DataError(
                "standard input is not UTF-8: convert it, with iconv for example"
            ) from error
        found = [line for line in lines if line.strip()]
        if not found:
            raise DataError("standard input holds no prompts")
        texts += found
    elif file is not None:
        texts += read_texts(file, column=column)
    if file is not None and not texts:
        raise DataError(f"{file} holds no prompts")
    return texts
