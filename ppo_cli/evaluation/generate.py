"""Responses of one model to prompts, and the loading of models and classifiers for that."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ppo_cli.config.functions import function_file
from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.config.reward import RewardConfig
from ppo_cli.config.schema import PolicyConfig, RunConfig
from ppo_cli.data.fingerprint import POLICY, Inputs, inputs_of, trusted_too
from ppo_cli.data.prompts import PromptEncoder
from ppo_cli.data.rows import Row
from ppo_cli.errors import DataError, ModelError, NumericalError
from ppo_cli.evaluation.draw_samples import draw_rollout, score_rollout
from ppo_cli.evaluation.samples import Generated
from ppo_cli.models.context import context_length, context_used
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.models.loading import load_policy, load_tokenizer
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.rewards.loading import load_reward
from ppo_cli.rewards.reward_sum import RewardSum
from ppo_cli.utils.text import shortened

REFERENCE = "reference"
PURE = SamplingParams()
LOADING = ("dtype", "attn_implementation", "quantization")
"""Settings of a run's policy that also hold when its models are loaded for sampling."""
WHOLE = PromptsConfig(cut=False)


@dataclass(frozen=True)
class Source:
    """A model to sample from.

    Attributes:
        name: its name on the screen.
        model, revision: folder or hub id, and the hub's revision.
        loading: the dtype, attention and quantisation to load it with; None for the defaults.
        stop: texts that end a response.
        inputs: records of the run whose policy it was at the start, by which it is found and
            compared.
    """

    name: str
    model: str
    revision: str | None = None
    stop: tuple[str, ...] = ()
    inputs: Inputs | None = None
    loading: PolicyConfig | None = None


@dataclass(frozen=True)
class Request:
    """Which models to sample and how to score them, by run directories and options.

    Attributes:
        sources: models to sample from, in order; the reference last, if it is wanted among them.
        reward: the classifier or the terms, if scores are wanted.
        run: configuration of the first run directory.
        device: of all models.
        trusted: models whose own code may run.
        reference: the reference of the first run directory, among `sources` or not.
        inputs: records of that run, by which its classifier and prompts are found.
        is_reward_of_run: whether `reward` is that of the run, apart from its label.
        prompts: how rows become queries.
    """

    sources: list[Source]
    reward: RewardConfig | None
    run: RunConfig | None
    device: torch.device
    trusted: Collection[str] = ()
    reference: Source | None = None
    inputs: Inputs | None = None
    is_reward_of_run: bool = False
    prompts: PromptsConfig = WHOLE

    @property
    def input_names(self) -> list[str]:
        """Names of all models, of classifiers, of reward functions and of the run's prompts."""
        models = [source.model for source in self.sources]
        if self.reward is not None:
            files = (
                function_file(term.function) for term in self.reward.terms or () if term.function
            )
            models += [*self.reward.models, *(str(file) for file in files if file)]
        return [*models, *(inputs_of(self.run).values() if self.run else ())]


@dataclass(frozen=True)
class Loaded:
    """A source's model, on its device, with its tokenizer and the tokens that end a response."""

    name: str
    model: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether its encoder reads the prompts, and its decoder writes the responses."""
        return is_encoder_decoder(self.model)

    def params(self, params: SamplingParams = PURE) -> SamplingParams:
        """`params` with the model's own stop and pad tokens."""
        pad = self.tokenizer.pad_token_id
        return replace(params, stop_token_ids=self.stop_token_ids, pad_token_id=pad)


def load_classifier(request: Request) -> RewardSum | None:
    """The reward of a request, if one is wanted, whose functions are run."""
    if request.reward is None:
        return None
    settings, trusted = request.reward, request.trusted
    if request.is_reward_of_run and request.inputs is not None:
        settings, changes = request.inputs.locate_reward(settings)
        _warn_of(changes, request.inputs)
        places = zip(request.reward.models, settings.models, strict=True)
        trusted = trusted_too(trusted, dict(places))
    return load_reward(settings, request.device, trusted=trusted)


def find_input(
    inputs: Inputs | None, key: str, name: str, revision: str | None = None
) -> tuple[str, str | None]:
    """Name and revision of an input of a run; warns where it has changed since the run began.

    Args:
        inputs: the run's records; None where there is no run.
        key: of the input.
        name, revision: as the run's settings have them.
    """
    if inputs is None:
        return name, revision
    found = inputs.find(key, name, revision)
    _warn_of(found.changes, inputs)
    return found.name, found.revision


def _warn_of(changes: Sequence[str], inputs: Inputs) -> None:
    """Warn of changes of a run's inputs, of each once."""
    for change in changes:
        if change not in inputs.shown:
            inputs.shown.add(change)
            warnings.warn(f"not as it was when the run began: {change}", stacklevel=3)


def generate(
    source: Source,
    rows: Sequence[Row],
    *,
    samples_each: int,
    max_new_tokens: int,
    seed: int,
    device: torch.device,
    reward: RewardSum | None,
    trusted: Collection[str] = (),
    params: SamplingParams = PURE,
    prompts: PromptsConfig = WHOLE,
) -> Generated:
    """Sample `samples_each` responses to each prompt from one model.

    Args:
        source: names the model.
        rows: texts to continue, or conversations to answer.
        samples_each: responses to each prompt.
        max_new_tokens: limit on a response.
        seed: equal seeds give every model the same random numbers.
        device: of the model.
        reward: scores the responses; None leaves scores out.
        trusted: models whose own code may run.
        params: settings of sampling; the model's own stop and pad tokens take the place of theirs.
        prompts: how the rows become queries.

    Raises:
        DataError: a prompt has no tokens, or exceeds the model's context.
        ModelError: the model cannot be loaded.
        UsageError: there are conversations, and the model's tokenizer has no chat template.
    """
    loaded = load_model(source, device, trusted, chat=chat_of(rows, prompts))
    ids = encode(loaded, rows, max_new_tokens, prompts)
    rows = [row for row in rows for _ in range(samples_each)]
    with sampling_errors(source.name):
        rollout = draw_rollout(
            loaded.model,
            loaded.tokenizer,
            [row for row in ids for _ in range(samples_each)],
            loaded.params(params),
            max_new_tokens=max_new_tokens,
            seed=seed,
            messages=[row.messages for row in rows],
        )
    texts = [row.text for row in rows]
    columns = [row.columns for row in rows]
    samples = score_rollout(rollout, texts, reward, columns, loaded.stop_token_ids)
    return Generated(source.name, samples)


def chat_of(rows: Sequence[Row], prompts: PromptsConfig) -> PromptsConfig | None:
    """`prompts`, by which conversations are answered; None where all rows are texts."""
    return prompts if any(row.messages is not None for row in rows) else None


@contextmanager
def sampling_errors(name: str) -> Iterator[None]:
    """Around sampling from the model `name` outside of training.

    Raises:
        ModelError: its probabilities are not finite.
    """
    try:
        yield
    except NumericalError as error:
        raise ModelError(
            f"{name}: its probabilities are not finite: its weights are damaged, or too large for "
            "the precision. Give another copy of the model"
        ) from error


def load_model(
    source: Source,
    device: torch.device,
    trusted: Collection[str] = (),
    chat: PromptsConfig | None = None,
) -> Loaded:
    """Load the model that a source names.

    Args:
        source: names the model.
        device: of the model.
        trusted: models whose own code may run.
        chat: where the model answers conversations, what their chat template is.

    Raises:
        ModelError: it cannot be loaded.
        UsageError: its tokenizer has no chat template, which `chat` needs.
    """
    name, revision = find_input(source.inputs, POLICY, source.model, source.revision)
    trusted = trusted_too(trusted, {source.model: name})
    tokenizer = load_tokenizer(name, revision, trusted)
    if chat is not None and chat.chat_template is not None:
        tokenizer.chat_template = chat.chat_template
    settings = PolicyConfig(model=name, revision=revision)
    if (given := source.loading) is not None:
        settings = settings.model_copy(update={key: getattr(given, key) for key in LOADING})
    policy = load_policy(settings, tokenizer, trusted, device)
    stop = tuple(end_tokens(tokenizer, source.stop, policy, chat=chat is not None))
    return Loaded(source.name, policy.to(device).eval(), tokenizer, stop)


def encode(
    loaded: Loaded, rows: Sequence[Row], max_new_tokens: int, prompts: PromptsConfig = WHOLE
) -> list[torch.Tensor]:
    """Prompts as token ids, 1-D; each leaves room for a response in the context.

    Raises:
        DataError: a prompt has no tokens, or exceeds the model's context.
    """
    encoder = PromptEncoder(
        loaded.tokenizer, prompts, name=loaded.name, complete=loaded.is_encoder_decoder
    )
    found = encoder.ids(rows)
    check_room(loaded, [row.text for row in rows], found, max_new_tokens)
    return [torch.tensor(row) for row in found]


def check_room(
    loaded: Loaded, prompts: Sequence[str], rows: Sequence[Sized], max_new_tokens: int
) -> None:
    """Raise `DataError` where one of `rows`, the tokens of `prompts`, is empty or too long."""
    context = context_length(loaded.model)
    for text, row in zip(prompts, rows, strict=True):
        if not len(row):
            raise DataError(f"prompt {text!r} has no tokens for {loaded.name}")
        if context is not None and context_used(loaded.model, len(row), max_new_tokens) > context:
            raise DataError(
                f"prompt '{shortened(text, 40)}' has {len(row)} tokens; with {max_new_tokens} "
                f"new ones it exceeds the context of {loaded.name} ({context}): shorten it, or "
                "lower --max-new-tokens"
            )
