"""Options that `generate` and `compare` share -> models, classifier and prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence

from pydantic import ValidationError

from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.config.reward import RewardConfig
from ppo_cli.config.reward_options import names_some, parse_option, with_consent, with_option
from ppo_cli.config.schema import RunConfig
from ppo_cli.config.section import check_name
from ppo_cli.data.consent import check_consent
from ppo_cli.data.fingerprint import Inputs
from ppo_cli.data.rows import Row, conversation, read_rows
from ppo_cli.data.sources import check_encodable
from ppo_cli.errors import DataError, UsageError
from ppo_cli.evaluation.generate import REFERENCE, WHOLE, Request, Source
from ppo_cli.models.loading import check_trusted
from ppo_cli.training.run_directory import RunDirectory, loading_settings
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
    rewards: Sequence[str] = (),
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
        rewards: values of `--reward`: consent to functions of the first run's reward; or, where
            they name none of these, the reward itself.
        chat: whether prompts are a user's messages; None for the first run's setting.
        system: system prompt of conversations; None for the first run's.

    Raises:
        UsageError: a classifier is needed and none is known, `trusted` names no model here, or
            there is a system prompt and no conversation.
        ConsentError: the run's reward has a function or an endpoint that `rewards` does not name.
    """
    _check_names(models, classifier)
    directories = [RunDirectory(model) for model in models]
    runs = [directory for directory in directories if directory.is_run()]
    configs = [directory.config() for directory in runs]  # a damaged one is an error
    run = configs[0] if configs else None
    inputs = Inputs(runs[0].recorded().get("inputs")) if runs else None
    stop = tuple(run.rollout.stop) if run is not None else ()
    loading = {id(d): loading_settings(d, c.policy) for d, c in zip(runs, configs, strict=True)}
    sources = [
        Source(
            str(directory.path) if directory in runs else model,
            model,
            None,
            stop,
            loading=loading.get(id(directory)),
        )
        for model, directory in zip(models, directories, strict=True)
    ]
    base = None
    if run is not None:
        policy = run.policy
        base = Source(REFERENCE, policy.model, policy.revision, stop, inputs, policy)
    if reference and base is not None:
        sources.append(base)
    reward, is_of_run = None, False
    if score:
        reward, is_of_run = _reward(models[0], run, sentiment, classifier, rewards)
        allowed = reward.foreign
        if is_of_run:
            reward, allowed = _consented(reward, rewards)
        check_consent(reward, allowed, models[0], inputs)
    loaded = [source.model for source in sources]
    loaded += reward.models if reward else []
    loaded += [run.policy.model] if run else []
    check_trusted(trusted, loaded)
    place = resolve_device(device)
    prompts = _prompt_settings(run, chat, system)
    return Request(sources, reward, run, place, trusted, base, inputs, is_of_run, prompts)


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
    model: str,
    run: RunConfig | None,
    sentiment: str | None,
    classifier: str | None,
    rewards: Sequence[str],
) -> tuple[RewardConfig, bool]:
    """The reward of the first run, or the one that was asked for; and whether it is the run's."""
    settings = RewardConfig() if run is None else run.reward
    is_of_run = run is not None and classifier is None
    if classifier is not None:
        settings = RewardConfig(model=classifier, output=settings.output)
    if rewards and not (is_of_run and _names_some(settings, rewards)):
        if sentiment is not None and classifier is None and run is None:
            raise UsageError(
                "--sentiment and --reward need a classifier: give one with --classifier"
            )
        return _with_rewards(settings, rewards, sentiment, add=bool(sentiment or classifier)), False
    if classifier is None and run is None:
        raise UsageError(
            f"{model} is no run directory, so it names no classifier: give one with "
            "--classifier (a folder, a hub id, or 'embedded'), or --no-score where there is one"
        )
    if sentiment is None:
        return settings, is_of_run
    if not settings.takes_sentiment:
        raise UsageError(
            "--sentiment has no effect: no term of the run's reward is a classifier without a "
            "sentiment of its own; leave it out"
        )
    return settings.model_copy(update={"sentiment": sentiment}), is_of_run


def _with_rewards(
    settings: RewardConfig, options: Sequence[str], sentiment: str | None, *, add: bool
) -> RewardConfig:
    """The terms that `--reward` names, beside those of `settings` if they are to be added."""
    section = settings.model_dump(mode="json")
    if sentiment is not None:
        section["sentiment"] = sentiment
    try:
        with_option(section, [parse_option(text) for text in options], add=add)
        return RewardConfig.model_validate(section)
    except ValidationError as error:
        raise UsageError(f"--reward: {error.errors()[0]['msg']}") from error
    except ValueError as error:
        raise UsageError(f"--reward: {error}") from error


def _consented(reward: RewardConfig, options: Sequence[str]) -> tuple[RewardConfig, list[str]]:
    try:
        return with_consent(reward, options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _names_some(reward: RewardConfig, options: Sequence[str]) -> bool:
    try:
        return names_some(reward, options)
    except ValueError as error:
        raise UsageError(f"--reward: {error}") from error


def recorded_scores(model: str) -> str | None:
    """The newest evaluation that a run directory has, in one line; None where it has none."""
    rows = RunDirectory(model).records.rows()
    found = next((row for row in reversed(rows) if "eval/score" in row), None)
    if found is None:
        return None
    terms = {key: value for key, value in found.items() if key.startswith("eval/rewards/")}
    shown = "".join(f", {key.rpartition('/')[2]} {value:.3f}" for key, value in terms.items())
    return (
        f"its own evaluation of step {found['step']}: score {found['eval/score']:.3f} (reference "
        f"{found.get('eval/reference_score', math.nan):.3f}){shown}, KL {found['eval/kl']:.2f}"
    )


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
