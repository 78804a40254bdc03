"""One trial of a model before it is used: is what will be computed what the model says?

The measure is a plain forward pass of each sequence alone. Ways of sampling and of reading that
differ from it in more than rounding are not taken; where none is left the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppo_cli.errors import ModelError, UnsuitableModel, UsageError
from ppo_cli.kernels.patches import plain_matmul
from ppo_cli.models.capabilities import (
    Reading,
    asking,
    findings,
    looks_ahead,
    no_autocast,
    precision,
    rope_switch,
    safer_readings,
    same,
)
from ppo_cli.models.context import context_length
from ppo_cli.models.decode_loop import LogitsCallback
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.utils.device import modes_kept
from ppo_cli.utils.random_state import RandomStream

LENGTHS = ((9, 2), (1, 4), (9, 1))
"""Tokens of each query and response: ragged, a short one that goes on after the others ended, two
queries that are alike in length."""
LOOKED_AT = (0, 1)
"""The sequences whose samples are compared: a long one beside its like, and the short one."""
SHORT = 1
"""The one whose reading is compared: packed it comes behind the others, padded it is padded."""
SMALL = 2**16
"""Numbers in a weight whose gradient is looked at; of larger ones, one of each shape."""

SamplingMethod = Literal["loop", "padded", "equal", "uncached", "whole"]
"""Our decode loop; transformers' `generate` on padded queries, on queries of equal length together,
on these without a cache; a plain forward pass of these for each token."""
Outputs = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities, entropies and values of N tokens, (N,) each."""


def choose_sampling_method(
    model: Any,
    methods: Sequence[SamplingMethod],
    sample: Callable[[SamplingMethod, list[Tensor], list[int], LogitsCallback], list[Tensor]],
    *,
    pad_token_id: int,
) -> SamplingMethod:
    """The first of `methods` of sampling whose logits are those of a plain forward pass.

    Args:
        model: a policy or a causal model.
        methods: the fastest first.
        sample: samples responses by a method, to queries, within limits.
        pad_token_id: with which `sample` fills up rows.

    Raises:
        UsageError: the model is not causal: its logits depend on later tokens.
        ModelError: none of the methods is right, or the model gives numbers that are not finite.
    """
    language_model = _language_model(model)
    if not isinstance(language_model, nn.Module):
        return methods[0]
    answers = findings(language_model)

    def is_right(method: SamplingMethod) -> bool:
        key = ("sampling", method, pad_token_id)
        if key not in answers:
            _refuse_if_it_looks_ahead(model)
            answers[key] = _samples_rightly(model, lambda *args: sample(method, *args))
        return bool(answers[key])

    return next(filter(is_right, methods), None) or _refuse(model, "samples")


@torch.no_grad()
def _samples_rightly(
    model: Any, sample: Callable[[list[Tensor], list[int], LogitsCallback], list[Tensor]]
) -> bool:
    queries, responses = _queries_and_responses(model)
    limits = [len(response) for response in responses]
    seen: list[list[Tensor]] = [[] for _ in queries]

    def collect(rows: Tensor, logits: Tensor) -> None:
        for row, of_row in zip(rows.tolist(), logits.float(), strict=True):
            seen[row].append(of_row.clone())

    with _undisturbed(model):
        try:
            with asking():
                responses = sample(queries, limits, collect)
        except UnsuitableModel:
            return False
        for i in LOOKED_AT:
            query, response = queries[i], responses[i]
            with plain_matmul():
                expected, _ = _plain_outputs(model, torch.cat([query, response]))
            found = torch.stack(seen[i][: len(response)])
            if not same(found, expected[len(query) - 1 : -1], precision(_language_model(model))):
                return False
    return True


def settle_reading(
    policy: AutoModelForCausalLMWithValueHead,
    read: Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs],
) -> None:
    """Have `policy` read sequences in the fastest way that is right, gradients included.

    Nothing is done where that was found out already.

    Args:
        policy: the model that reads.
        read: what it says, as it reads now, of each token of responses to queries.

    Raises:
        UsageError: the model looks ahead, so it is not causal.
        ModelError: no way is right, or the model gives numbers that are not finite.
    """
    answers = findings(policy.pretrained_model)
    if "reading is right" in answers:
        return
    _refuse_if_it_looks_ahead(policy)
    queries, responses = _queries_and_responses(policy)
    parameters, dtype = _few_of_each_kind(policy), precision(policy.pretrained_model)

    def with_gradients(run: Callable[[], Outputs]) -> tuple[Outputs, list[Tensor]]:
        """Outputs of the short response, and gradients of a sum in which no two weigh alike."""
        with torch.set_grad_enabled(bool(parameters)):
            logprobs, entropies, values = run()
            found = (logprobs.detach(), entropies.detach(), values.detach())
            if not parameters:
                return found, []
            weights = torch.linspace(1, 2, len(logprobs), device=logprobs.device)
            total = (logprobs * weights + entropies * weights.square()).sum()
            total = total + (values * weights.to(values.device)).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return found, [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]

    def read_short() -> Outputs:
        start = sum(len(response) for response in responses[:SHORT])
        kept = slice(start, start + len(responses[SHORT]))
        logprobs, entropies, values = read(queries, responses)
        return logprobs[kept], entropies[kept], values[kept]

    def is_right(reading: Reading) -> bool:
        policy.read_as(reading)
        try:
            with asking():
                found = with_gradients(read_short)
        except UnsuitableModel:
            return False
        outputs_agree = _outputs_agree(found[0], outputs, plain.scale, dtype)
        return outputs_agree and _gradients_agree(found[1], gradients, dtype)

    with _undisturbed(policy):
        try:
            with plain_matmul(), asking():
                plain = _PlainReading(policy)
                outputs, gradients = with_gradients(lambda: plain(queries[SHORT], responses[SHORT]))
        except UnsuitableModel as error:
            raise ModelError(f"{_name(policy)} cannot be tuned: {error}") from error
        fastest = policy.reading()
        try:
            if next(filter(is_right, [fastest, *safer_readings(fastest)]), None) is None:
                _refuse(policy, "reads")
        except BaseException:
            policy.read_as(fastest)
            raise
    answers["reading is right"] = True


def refuse_noise(
    policy: AutoModelForCausalLMWithValueHead,
    read: Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs],
) -> None:
    """Raise `ModelError` where a model in its present modes differs from itself in eval mode.

    Args:
        policy: as gradient checkpointing needs it, and noise that is known of set to zero.
        read: as of `settle_reading`.
    """
    answers = findings(policy.pretrained_model)
    if "is quiet" in answers:
        return
    queries, responses = _queries_and_responses(policy)
    with torch.no_grad():
        with RandomStream(0, torch.device(policy.device)).active(), no_autocast(policy):
            found = read(queries, responses)
        with _undisturbed(policy):
            expected, scale = read(queries, responses), logits_of_trial(policy).abs().max()
    if not _outputs_agree(found, expected, scale, precision(policy.pretrained_model)):
        raise ModelError(
            f"{_name(policy)} adds noise in training mode, in which alone gradient checkpointing "
            "works: set gradient_checkpointing to false (ppo.gradient_checkpointing)"
        )
    answers["is quiet"] = True


@torch.no_grad()
def logits_of_trial(model: Any) -> Tensor:
    """Logits (N, V), float32, on the CPU, of plain forwards of the trial's sequences."""
    queries, responses = _queries_and_responses(model)
    rows = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    with _undisturbed(model), plain_matmul():
        return torch.cat([_plain_outputs(model, row)[0] for row in rows]).cpu()


def starts_as_its_base(policy: AutoModelForCausalLMWithValueHead) -> bool:
    """Whether a policy with an adapter is, as it starts and whatever it learns, the reference.

    That is, with the adapter off: it changes nothing yet, and nothing outside of it is trained.
    """

    def base() -> Tensor:
        with policy.pretrained_model.disable_adapter():
            return logits_of_trial(policy)

    dtype, before = precision(policy.pretrained_model), base()
    if not same(logits_of_trial(policy), before, dtype):
        return False
    trained = [p for p in policy.pretrained_model.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device, parameter.dtype))
        return same(base(), before, dtype)
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)


class _PlainReading:
    """What a policy says of a response's tokens, by a plain forward of the sequence alone.

    Attributes:
        scale: the largest logit, by which probabilities are rounded.
    """

    def __init__(self, policy: AutoModelForCausalLMWithValueHead) -> None:
        self.policy = policy
        self.scale = torch.zeros((), device=policy.device)

    def __call__(self, query: Tensor, response: Tensor) -> Outputs:
        logits, hidden = _plain_outputs(self.policy, torch.cat([query, response]))
        logits, hidden = logits[len(query) - 1 : -1], hidden[len(query) - 1 : -1]
        self.scale = logits.detach().abs().max()
        log_p = logits.log_softmax(-1)
        values = self.policy.v_head(hidden.to(self.policy.device)).squeeze(-1).float()
        entropies = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, response.unsqueeze(1)).squeeze(1), entropies, values


def _plain_outputs(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V), float32, and last hidden states (T, H) of a plain forward of (T,) `ids`.

    Raises:
        ModelError: they are not finite, or the model cannot be run.
    """
    language_model = _language_model(model)
    has_values = isinstance(model, AutoModelForCausalLMWithValueHead)
    try:
        with asking():
            output = language_model(
                input_ids=ids.unsqueeze(0), use_cache=False, output_hidden_states=has_values
            )
    except UnsuitableModel as error:
        raise ModelError(f"{_name(model)} cannot read a sequence of tokens: {error}") from error
    logits = output.logits[0, -len(ids) :].float()
    if not logits.isfinite().all():
        raise ModelError(
            f"{_name(model)} gives numbers that are not finite: its weights are damaged, or too "
            "large for its precision"
        )
    if not has_values:
        return logits, logits
    return logits, model.last_hidden_states(output)[0, -len(ids) :]


def _outputs_agree(found: Outputs, expected: Outputs, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probabilities, entropies and values differ in rounding alone."""
    scales = (scale, scale, expected[2].abs().max().clamp(min=1))
    return all(same(a, b, dtype, s) for a, b, s in zip(found, expected, scales, strict=True))


def _gradients_agree(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> bool:
    sizes = [float(gradient.norm()) for gradient in expected]
    # A gradient that is nothing but rounding, as that of keys' biases, may differ in all of it.
    noise = 1e-3 * max(sizes, default=0.0)
    share = 0.01 if torch.finfo(dtype).bits >= 32 else 0.2
    return all(
        float((a - b).norm()) <= share * size + noise
        for a, b, size in zip(found, expected, sizes, strict=True)
    )


def _few_of_each_kind(policy: AutoModelForCausalLMWithValueHead) -> list[Tensor]:
    """Trainable weights whose gradients are compared: all small ones, else one of each shape."""
    chosen: dict[Any, Tensor] = {}
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.numel():
            key = id(parameter) if parameter.numel() <= SMALL else parameter.shape
            chosen.setdefault(key, parameter)
    return list(chosen.values())


def _queries_and_responses(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences of `LENGTHS`, without the tokens that stand for something else than text."""
    language_model = _language_model(model)
    config = language_model.config
    count = language_model.get_input_embeddings().weight.shape[0]
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    reserved = {
        value
        for key, value in settings.items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ids = torch.tensor([i for i in range(min(count, 1000)) if i not in reserved] or [0])
    limits = context_length(language_model), rope_switch(config)
    room = min((limit for limit in limits if limit is not None), default=100)
    half = max(room // 2, 1)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        chosen = torch.randint(len(ids), (min(length, half),), generator=generator)
        return ids[chosen].to(model.device)

    queries, responses = zip(*((draw(query), draw(new)) for query, new in LENGTHS), strict=True)
    return list(queries), list(responses)


def _undisturbed(model: Any) -> AbstractContextManager[Any]:
    """Eval mode in the model's own precision; modes and random state are as before afterwards."""
    stack = ExitStack()
    stack.enter_context(modes_kept(model))
    stack.enter_context(no_autocast(model))
    stack.enter_context(RandomStream(0, torch.device(model.device)).active())
    model.eval()
    return stack


def _language_model(model: Any) -> Any:
    return getattr(model, "pretrained_model", model)


def _name(model: Any) -> str:
    config = _language_model(model).config
    return str(getattr(config, "_name_or_path", "") or type(_language_model(model)).__name__)


def _refuse_if_it_looks_ahead(model: Any) -> None:
    base = _language_model(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if not looks_ahead(base):
        return
    _refuse_if_it_mixes_tokens(model)
    raise UsageError(
        f"{_name(model)} looks ahead: what it says at a position depends on the tokens after it: "
        f"{type(base).__name__} is not a causal language model as it is configured. Where its "
        "config.json has is_decoder, set that to true; or give another model"
    )


def _refuse_if_it_mixes_tokens(model: Any) -> None:
    """Raise `ModelError` for layers that round each number by the range of the whole input."""
    if any("nn.quantized.dynamic" in type(m).__module__ for m in _language_model(model).modules()):
        raise ModelError(
            f"{_name(model)} is quantised by the range of each whole input (quantize_dynamic), so "
            "what it says of a token depends on all others: give the model as it was before, or "
            "quantise its weights alone"
        )


def _refuse(model: Any, does: Literal["samples", "reads"]) -> Any:
    """Raise `ModelError` that names what is wrong with a model."""
    _refuse_if_it_mixes_tokens(model)
    name = _name(model)
    ids = _queries_and_responses(model)[0][-1]
    with torch.no_grad(), _undisturbed(model), plain_matmul():
        first, again = (_plain_outputs(model, ids)[0] for _ in range(2))
    if not same(again, first):
        raise ModelError(
            f"{name} does not say the same of the same text twice, even in eval mode: PPO compares "
            "probabilities, so it needs a model that does; give another"
        )
    ways = {
        "samples": "sampled token by token, with its cache or without, it",
        "reads": "asked for the probabilities of a batch's tokens, or their gradients, it",
    }
    raise ModelError(
        f"{name}: {ways[does]} differs from its own forward pass of each text alone. "
        f"{type(_language_model(model)).__name__} cannot be used; give another model"
    )
