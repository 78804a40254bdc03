"""Options that `generate` and `compare` share -> models, classifier and prompts."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.config.schema import RewardConfig, RunConfig
from ppo_cli.config.section import check_name
from ppo_cli.data.fingerprint import Inputs
from ppo_cli.data.rows import Row, conversation, read_rows
from ppo_cli.data.sources import check_encodable
from ppo_cli.errors import DataError, UsageError
from ppo_cli.evaluation.generate import REFERENCE, WHOLE, Request, Source
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
    chat: bool | None = None,
    system: str | None = None,
) -> Request:
    """Resolve the models of a command, their reference and their classifier.

    The first run directory among the models names the reference, the classifier, and in
    `rollout.stop` what ends a response; all of them apply to every model.

    Args:
        models: run directories, model folders or hub ids.
        reference: also sample from the reference of the first run directory among them.
        score: whether responses are scored.
        sentiment: label to score; None for the first run's.
        classifier: hub id or folder; None for the first run's.
        device: as `resolve_device` takes it.
        trusted: models, named as in `models` or a run's configuration, whose own code may run.
        chat: whether prompts are a user's messages; None for the first run's setting.
        system: system prompt of conversations; None for the first run's.

    Raises:
        UsageError: a classifier is needed and none is known, `trusted` names no model here, or
            there is a system prompt and no conversation.
    """
    _check_names(models, classifier)
    directories = [RunDirectory(model) for model in models]
    runs = [directory for directory in directories if directory.is_run()]
    configs = [directory.config() for directory in runs]  # a damaged one is an error
    run = configs[0] if configs else None
    inputs = Inputs(runs[0].recorded().get("inputs")) if runs else None
    stop = tuple(run.rollout.stop) if run is not None else ()
    sources = [
        Source(str(directory.path) if directory in runs else model, model, None, stop)
        for model, directory in zip(models, directories, strict=True)
    ]
    base = None
    if run is not None:
        base = Source(REFERENCE, run.policy.model, run.policy.revision, stop, inputs)
    if reference and base is not None:
        sources.append(base)
    reward = _reward(models[0], run, sentiment, classifier) if score else None
    loaded = [source.model for source in sources]
    loaded += [reward.model] if reward else []
    loaded += [run.policy.model] if run else []
    check_trusted(trusted, loaded)
    prompts = _prompt_settings(run, chat, system)
    return Request(sources, reward, run, resolve_device(device), trusted, base, inputs, prompts)


def _prompt_settings(run: RunConfig | None, chat: bool | None, system: str | None) -> PromptsConfig:
    """Whole texts, or conversations with the template and system prompt of the first run."""
    settings = PromptsConfig() if run is None else run.prompts
    own = next((source for source in settings.mixture if source.chat), None)
    if chat is False or (chat is None and own is None):
        if system is not None:
            raise UsageError("--system is for conversations: give --chat too, or leave it out")
        return WHOLE
    return PromptsConfig(
        cut=False,
        chat=True,
        system=system or (own.system if own else None),
        chat_template=settings.chat_template,
        chat_template_kwargs=settings.chat_template_kwargs,
    )


def _check_names(models: Sequence[str], classifier: str | None) -> None:
    """Raise `UsageError` for a name that cannot be one of a model."""
    names = [("model", model) for model in models]
    if classifier is not None:
        names.append(("--classifier", classifier))
    for what, name in names:
        try:
            check_name(name)
        except ValueError as error:
            raise UsageError(f"{what} '{shortened(name, 40)}' {error}") from error


def _reward(
    model: str, run: RunConfig | None, sentiment: str | None, classifier: str | None
) -> RewardConfig:
    """The classifier of the first run, or the one that was asked for, and its label."""
    settings = RewardConfig() if run is None else run.reward
    if classifier is not None:
        settings = RewardConfig(model=classifier, output=settings.output)
    elif run is None:
        raise UsageError(
            f"{model} is no run directory, so it names no classifier: give one with "
            "--classifier (a folder, a hub id, or 'embedded'), or --no-score where there is one"
        )
    if sentiment is None:
        return settings
    return settings.model_copy(update={"sentiment": sentiment})


def read_prompts(
    prompts: Sequence[str], file: str | None, column: str, settings: PromptsConfig
) -> list[Row]:
    """Read prompts given one by one, then those of a file (`-`: standard input, one a line).

    Args:
        prompts: texts.
        file: None for no file.
        column: of the texts or conversations in the file.
        settings: whether the prompts are conversations, and their system prompt.

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
    rows = [row_of(text, settings) for text in texts]
    if file not in (None, "-"):
        place = {"source": file, "text_column": column}
        rows += read_rows(settings.model_copy(update=place))
    if file is not None and not rows:
        raise DataError(f"{file} holds no prompts")
    return rows


def row_of(text: str, settings: PromptsConfig) -> Row:
    """A prompt: a text, or with `chat` a user's message."""
    if not settings.chat:
        return Row(text)
    row = conversation(text, "a prompt", system=settings.system)
    assert row is not None  # it is not blank
    return row
