"""The self-check of a model before it is used: are our fast paths right for it?

They are compared with a plain forward pass of each sequence alone (`plain_forward.py`). A method of
sampling, or of reading sequences, that differs by more than rounding is not used; where none is
right the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppo_cli.errors import ModelError, UnsuitableModel, UsageError
from ppo_cli.kernels.patches import plain_layers
from ppo_cli.models.capabilities import (
    Reading,
    check_results,
    looks_ahead,
    no_autocast,
    precision,
    safer_readings,
    same,
    unsuitable_errors,
)
from ppo_cli.models.decode_loop import LogitsCallback
from ppo_cli.models.plain_forward import (
    Outputs,
    PlainReading,
    language_model,
    model_name,
    plain_outputs,
    queries_and_responses,
    sample_logits,
    undisturbed,
)
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.utils.random_state import RandomStream

SAMPLED = (0, 1)
"""Indices of the sequences whose samples are compared: a long one, which has another of its length,
and the short one."""
SHORT = 1
"""Index of the sequence whose log-probabilities are compared. In a packed row others come before
it; in a padded row it is the one that is padded."""
SMALL = 2**16
"""Elements of a small weight. The gradients of all small weights are compared; of larger ones, one
of each shape."""

SamplingMethod = Literal["loop", "padded", "equal", "uncached", "whole"]
"""Our decode loop; transformers' `generate` on padded queries, on queries of equal length together,
on these without a cache; a plain forward pass of these for each token."""


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
    inner = language_model(model)
    if not isinstance(inner, nn.Module):
        return methods[0]
    answers = check_results(inner)

    def is_right(method: SamplingMethod) -> bool:
        key = ("sampling", method, pad_token_id)
        if key not in answers:
            _refuse_lookahead(model)
            answers[key] = _samples_rightly(model, lambda *args: sample(method, *args))
        return bool(answers[key])

    return next(filter(is_right, methods), None) or _refuse(model, "samples")


@torch.no_grad()
def _samples_rightly(
    model: Any, sample: Callable[[list[Tensor], list[int], LogitsCallback], list[Tensor]]
) -> bool:
    queries, responses = queries_and_responses(model)
    limits = [len(response) for response in responses]
    seen: list[list[Tensor]] = [[] for _ in queries]

    def collect(rows: Tensor, logits: Tensor) -> None:
        for row, of_row in zip(rows.tolist(), logits.float(), strict=True):
            seen[row].append(of_row.clone())

    with undisturbed(model):
        try:
            with unsuitable_errors():
                responses = sample(queries, limits, collect)
        except UnsuitableModel:
            return False
        for i in SAMPLED:
            query, response = queries[i], responses[i]
            with plain_layers():
                expected, _ = plain_outputs(model, query, response)
            found = torch.stack(seen[i][: len(response)])
            expected = expected[-len(response) - 1 : -1]
            if not same(found, expected, precision(language_model(model))):
                return False
    return True


def settle_reading(
    policy: AutoModelForCausalLMWithValueHead,
    read: Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs],
) -> None:
    """Have `policy` read sequences in the fastest way that is right, gradients included.

    The check is made once, until the model changes.

    Args:
        policy: the model.
        read: its outputs for each token of responses to queries, by its present `reading()`.

    Raises:
        UsageError: the model is not causal: its outputs depend on later tokens.
        ModelError: no way is right, or the model gives numbers that are not finite.
    """
    answers = check_results(policy.pretrained_model)
    if "reading is right" in answers:
        return
    _refuse_lookahead(policy)
    queries, responses = queries_and_responses(policy)
    parameters, dtype = _few_of_each_kind(policy), precision(policy.pretrained_model)

    def with_gradients(run: Callable[[], Outputs]) -> tuple[Outputs, list[Tensor]]:
        """Outputs of the short response, and gradients of their sum with different weights."""
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
            with unsuitable_errors():
                found = with_gradients(read_short)
        except UnsuitableModel:
            return False
        outputs_agree = _outputs_agree(found[0], outputs, plain.scale, dtype)
        return outputs_agree and _gradients_agree(found[1], gradients, dtype)

    with undisturbed(policy):
        try:
            with plain_layers(), unsuitable_errors():
                plain = PlainReading(policy)
                outputs, gradients = with_gradients(lambda: plain(queries[SHORT], responses[SHORT]))
        except UnsuitableModel as error:
            raise ModelError(f"{model_name(policy)} cannot be tuned: {error}") from error
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
    """Raise `ModelError` where a model's outputs in its present modes are not those in eval mode.

    Args:
        policy: in the modes that gradient checkpointing needs, with every known dropout at zero.
        read: as in `settle_reading`.
    """
    answers = check_results(policy.pretrained_model)
    if "is quiet" in answers:
        return
    queries, responses = queries_and_responses(policy)
    with torch.no_grad():
        with RandomStream(0, torch.device(policy.device)).active(), no_autocast(policy):
            found = read(queries, responses)
        with undisturbed(policy):
            expected, scale = read(queries, responses), sample_logits(policy).abs().max()
    if not _outputs_agree(found, expected, scale, precision(policy.pretrained_model)):
        raise ModelError(
            f"{model_name(policy)} adds noise in training mode, and gradient checkpointing works "
            "in no other mode: set gradient_checkpointing to false (ppo.gradient_checkpointing)"
        )
    answers["is quiet"] = True


def _outputs_agree(found: Outputs, expected: Outputs, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probabilities, entropies and values are equal up to rounding."""
    scales = (scale, scale, expected[2].abs().max().clamp(min=1))
    return all(same(a, b, dtype, s) for a, b, s in zip(found, expected, scales, strict=True))


def _gradients_agree(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> bool:
    sizes = [float(gradient.norm()) for gradient in expected]
    # A gradient that is zero but for rounding, as that of keys' biases, may differ entirely.
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


def _refuse_lookahead(model: Any) -> None:
    base = language_model(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if not looks_ahead(base):
        return
    _refuse_dynamic_quantisation(model)
    raise UsageError(
        f"{model_name(model)} looks ahead: its output at a position depends on later tokens. "
        f"{type(base).__name__} is not a causal language model as it is configured. Where its "
        "config.json has is_decoder, set that to true; or give another model"
    )


def _refuse_dynamic_quantisation(model: Any) -> None:
    """Raise `ModelError` for layers that round each element by the range of the whole input."""
    if any("nn.quantized.dynamic" in type(m).__module__ for m in language_model(model).modules()):
        raise ModelError(
            f"{model_name(model)} is quantised by the range of each whole input "
            "(quantize_dynamic), so its output for a token depends on all others: give the model "
            "before quantisation, or quantise its weights alone"
        )


def _refuse(model: Any, does: Literal["samples", "reads"]) -> Any:
    """Raise a `ModelError` that says why no method is right for a model."""
    _refuse_dynamic_quantisation(model)
    name = model_name(model)
    query, response = (rows[-1] for rows in queries_and_responses(model))
    with torch.no_grad(), undisturbed(model), plain_layers():
        first, again = (plain_outputs(model, query, response)[0] for _ in range(2))
    if not same(again, first):
        raise ModelError(
            f"{name} does not give the same output for the same text twice, even in eval mode. "
            "PPO compares probabilities, so it cannot use this model; give another"
        )
    outputs = {
        "samples": "its logits while sampling, with a cache or without,",
        "reads": "its probabilities of a batch's tokens, or their gradients,",
    }
    raise ModelError(
        f"{name}: {outputs[does]} differ from its own forward pass of each text alone. "
        f"{type(language_model(model)).__name__} cannot be used; give another model"
    )
