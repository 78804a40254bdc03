"""Sampling by transformers' own `generate`, and what its keyword arguments ask for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ppo_cli.errors import UsageError
from ppo_cli.models.decode_loop import LogitsCallback, not_finite
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.sharding import is_sharded

# Every setting that changes the distribution, at the value that leaves it unchanged. Without them
# `generate` would take the model's own generation_config where no setting is given, and its top-k
# or penalties make samples that are not the policy's.
PURE_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
}

DEFAULT_NEW_TOKENS = 20  # transformers' own limit where no length is given


@dataclass(frozen=True)
class GenerateSettings:
    """Settings that only transformers' `generate` can follow: beams, penalties, its own criteria.

    Attributes:
        stop_token_ids: tokens that end a response, which includes them.
        pad_token_id: fills up the shorter rows of a batch.
        generation_config: takes the place of the model's own.
        stopping_criteria: end a batch's rows, besides their limits.
        stop_strings: texts that end a response, which includes the token that completes one.
        tokenizer: decodes responses to find `stop_strings`.
        kwargs: other keywords of `generate`; they override `generation_config`.
    """

    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    generation_config: GenerationConfig = field(
        default_factory=lambda: GenerationConfig(**PURE_SAMPLING)
    )
    stopping_criteria: Sequence[StoppingCriteria] = ()
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, params: SamplingParams) -> GenerateSettings:
        """The settings with which `generate` samples as `params` say."""
        kwargs = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p")}
        return cls(params.stop_token_ids, params.pad_token_id, kwargs=kwargs)


def from_generation_kwargs(
    *,
    eos_token_id: int | Sequence[int] | Tensor | None,
    pad_token_id: int | None,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> SamplingParams | GenerateSettings:
    """What keywords of transformers' `generate` ask for.

    Args:
        eos_token_id: one or several tokens that end a response, or None.
        pad_token_id: fills up the shorter rows of a batch.
        generation_config: the base that `kwargs` change; None for pure sampling.
        stopping_criteria: end a batch's rows, besides their limits.
        stop_strings: texts that end a response, which includes the token that completes one.
        tokenizer: decodes responses to find `stop_strings`.
        kwargs: other keywords, but those of the response's length (`without_lengths`).

    Returns:
        `SamplingParams` where they say it all, else `GenerateSettings`.

    Raises:
        UsageError: several sequences are asked for each query, or a stop string is empty.
    """
    if kwargs.get("num_return_sequences", 1) != 1:
        raise UsageError("num_return_sequences must be 1: repeat the queries instead")
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.tolist()
    ends = [eos_token_id] if isinstance(eos_token_id, int) else (eos_token_id or ())
    stop = tuple(ends)
    strings = stop_strings or getattr(generation_config, "stop_strings", None) or ()
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if "" in strings:
        raise UsageError("stop_strings: '' is in every text: leave it out")
    if strings and tokenizer is None:
        raise UsageError("stop_strings needs the tokenizer: pass tokenizer, too")
    if generation_config is None and not stopping_criteria and not strings:
        plain = _plain_settings(kwargs)
        if plain is not None:
            return SamplingParams(**plain, stop_token_ids=stop, pad_token_id=pad_token_id)
    config = generation_config or GenerationConfig(**PURE_SAMPLING)
    if strings:  # transformers' own criterion reads the query, too, and not every tokenizer
        config = copy.deepcopy(config)
        config.stop_strings = None
    criteria = stopping_criteria or ()
    return GenerateSettings(stop, pad_token_id, config, criteria, strings, tokenizer, kwargs)


def _plain_settings(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Temperature, top-k and top-p, where nothing but these differs from pure sampling."""
    settings = PURE_SAMPLING | dict(kwargs)
    types = {"temperature": float, "top_k": int, "top_p": float}
    plain = {name: settings[name] for name in types}
    settings |= {name: PURE_SAMPLING[name] for name in types}
    if (settings["min_length"] or 0) <= 0:
        settings["min_length"] = PURE_SAMPLING["min_length"]
    if settings != PURE_SAMPLING or None in plain.values():
        return None
    return {name: as_type(plain[name]) for name, as_type in types.items()}


LENGTHS = ("max_new_tokens", "max_length")
OF_THE_SAMPLER = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids")


def keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `generate`, those that a `generation_config` among them sets included.

    What neither sets keeps its default here, so the distribution stays the policy's own.

    Raises:
        UsageError: a keyword is not for sampling responses to queries.
    """
    config = given.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise UsageError(
            f"generation_config must be a GenerationConfig, got {type(config).__name__}"
        )
    for name in OF_THE_SAMPLER:
        if name in given:
            raise UsageError(f"{name}: queries are padded and masked here, leave it out")
    settings = {} if config is None else _set_in(config)
    settings |= {key: value for key, value in given.items() if key != "generation_config"}
    if settings.pop("return_dict_in_generate", False):
        raise UsageError(
            "return_dict_in_generate: responses are tensors here. For scores call the model's own "
            "generate: model.generate(query.unsqueeze(0), return_dict_in_generate=True, ...)"
        )
    return settings


def _set_in(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a configuration that differ from the default."""
    default = vars(GenerationConfig())
    return {
        key: value
        for key, value in vars(config).items()
        if key in default and value != default[key] and not key.startswith("_")
    }


def without_lengths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those of the response's length."""
    return {key: value for key, value in settings.items() if key not in LENGTHS}


def new_token_limits(
    queries: Sequence[Tensor],
    length_sampler: Callable[[], int] | None,
    given: Mapping[str, Any],
    own: GenerationConfig | None = None,
) -> list[int]:
    """Limits on the new tokens of each query.

    Args:
        queries: B tensors of token ids.
        length_sampler: called for each query, and wins over what is given.
        given: keywords of `generate`.
        own: the model's own configuration, for a limit where nothing else sets one.

    Raises:
        UsageError: a limit is not a whole number of 1 or more.
    """
    if length_sampler is not None:
        return [_limit(length_sampler(), "what length_sampler returns") for _ in queries]
    sources = (given, keywords(given), {} if own is None else _set_in(own))
    for settings in sources:
        if settings.get("max_new_tokens") is not None:
            return [_limit(settings["max_new_tokens"], "max_new_tokens")] * len(queries)
        if settings.get("max_length") is not None:
            total = _limit(settings["max_length"], "max_length")
            return [max(total - query.numel(), 1) for query in queries]
    return [DEFAULT_NEW_TOKENS] * len(queries)


def _limit(value: Any, name: str) -> int:
    number = float(value)
    if number < 1 or number != int(number):
        raise UsageError(f"{name} must be a whole number of 1 or more, got {value}")
    return int(number)


def generate_responses(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    limits: Sequence[int],
    settings: GenerateSettings,
    *,
    use_cache: bool,
    on_logits: LogitsCallback | None = None,
) -> list[Tensor]:
    """Sample a response to each query by the model's `generate`.

    Args:
        model: in eval mode.
        input_ids: (B, T) queries, padded on the left; for an encoder on the right.
        attention_mask: (B, T).
        limits: B limits on the new tokens.
        settings: of `generate`.
        use_cache: False makes it read the whole rows for each token.
        on_logits: called with each token's logits.

    Returns:
        B tensors of token ids, 1-D, each with its end token if one was drawn, without a decoder's
        start token.

    Raises:
        NumericalError: a probability is not finite.
    """
    kwargs, width = dict(settings.kwargs), input_ids.shape[1]
    if (start := decoder_start(model)) is not None:
        kwargs["decoder_start_token_id"], width = start, 1  # the output is the decoder's
    if not use_cache:
        kwargs["use_cache"] = False
    if on_logits is not None:
        kwargs["logits_processor"] = LogitsProcessorList([_PassOn(on_logits)])
    if is_sharded(model):  # processes may draw different numbers of tokens from gathered weights
        kwargs["synced_gpus"] = False
    row_limits = _RowLimits(torch.tensor(limits, device=model.device) + width)
    criteria = [*settings.stopping_criteria, row_limits]
    if settings.stop_strings:
        criteria.append(_StopStrings(settings, width))
    with _generation_config(model, settings.generation_config), _finite_probabilities():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            stopping_criteria=StoppingCriteriaList(criteria),
            max_new_tokens=max(limits),
            pad_token_id=settings.pad_token_id or 0,
            eos_token_id=list(settings.stop_token_ids) or None,
            **kwargs,
        )
    rows = zip(output[:, width:], limits, strict=True)
    ended = [_until_end(row[:limit], set(settings.stop_token_ids)) for row, limit in rows]
    return [_until_text(row, settings) for row in ended] if settings.stop_strings else ended


class _PassOn(LogitsProcessor):
    """Passes all rows' logits to a callback, and leaves them as they are."""

    def __init__(self, on_logits: LogitsCallback) -> None:
        self.on_logits = on_logits

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.on_logits(torch.arange(len(scores)), scores)
        return scores


class _RowLimits(StoppingCriteria):
    """Ends each row at its own length, (B,) tokens, padding and query included."""

    def __init__(self, limits: Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        beams = len(input_ids) // len(self.limits)
        return input_ids.shape[1] >= self.limits.repeat_interleave(beams)


class _StopStrings(StoppingCriteria):
    """Ends each row whose response, from a position on, holds one of the stop strings."""

    def __init__(self, settings: GenerateSettings, start: int) -> None:
        self.settings, self.start = settings, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        found = [_holds_stop(row, self.settings) for row in input_ids[:, self.start :]]
        return torch.tensor(found, device=input_ids.device)


def _holds_stop(row: Tensor, settings: GenerateSettings) -> bool:
    text = settings.tokenizer.decode(row, clean_up_tokenization_spaces=False)
    return any(string in text for string in settings.stop_strings)


def _until_text(row: Tensor, settings: GenerateSettings) -> Tensor:
    """`row` up to the token that completes a stop string, that one included."""
    if not _holds_stop(row, settings):
        return row
    lengths = range(1, len(row) + 1)
    return next(row[:length] for length in lengths if _holds_stop(row[:length], settings))


def _until_end(row: Tensor, end_ids: set[int]) -> Tensor:
    """`row` up to its first end token, that one included."""
    for position, token in enumerate(row.tolist()):
        if token in end_ids:
            return row[: position + 1]
    return row


@contextmanager
def _finite_probabilities() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise not_finite() from error


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the model's own, which `generate` would mix in."""
    owner = getattr(model, "pretrained_model", model)
    # peft's generate passes its own on to the model below it.
    inner = owner.get_base_model() if hasattr(owner, "get_base_model") else owner
    before, inner_before = owner.generation_config, inner.generation_config
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = before
        inner.generation_config = inner_before
