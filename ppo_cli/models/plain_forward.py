"""The model's own forward pass of each sequence alone, with which the self-check compares."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from ppo_cli.errors import ModelError, UnsuitableModel
from ppo_cli.kernels.patches import plain_layers
from ppo_cli.models.capabilities import no_autocast, rope_switch, unsuitable_errors
from ppo_cli.models.context import context_length
from ppo_cli.models.encoder_decoder import is_encoder_decoder, plain_inputs
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.utils.device import modes_kept
from ppo_cli.utils.random_state import RandomStream

LENGTHS = ((9, 2), (1, 4), (9, 1))
"""Tokens of each query and response: of different lengths, a short query whose response goes on
after the others ended, two queries of equal length."""

Outputs = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities, entropies and values of N tokens, (N,) each."""


class PlainReading:
    """A policy's outputs for a response's tokens, by a plain forward pass of the sequence alone.

    Attributes:
        scale: the largest logit, by which probabilities are rounded.
    """

    def __init__(self, policy: AutoModelForCausalLMWithValueHead) -> None:
        self.policy = policy
        self.scale = torch.zeros((), device=policy.device)

    def __call__(self, query: Tensor, response: Tensor) -> Outputs:
        outputs = plain_outputs(self.policy, query, response)
        logits, hidden = (rows[-len(response) - 1 : -1] for rows in outputs)
        self.scale = logits.detach().abs().max()
        log_p = logits.log_softmax(-1)
        values = self.policy.v_head(hidden.to(self.policy.device)).squeeze(-1).float()
        entropies = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, response.unsqueeze(1)).squeeze(1), entropies, values


def plain_outputs(model: Any, query: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V), float32, and last hidden states (T, H) of a plain forward of one sequence.

    The T tokens are query and response; in an encoder-decoder those that its decoder reads.

    Raises:
        ModelError: they are not finite, or the model cannot be run.
    """
    has_values = isinstance(model, AutoModelForCausalLMWithValueHead)
    inputs = plain_inputs(model, query, response)
    length = next(reversed(inputs.values())).shape[1]  # prompt tuning adds virtual tokens
    try:
        with unsuitable_errors():
            output = language_model(model)(
                **inputs, use_cache=False, output_hidden_states=has_values
            )
    except UnsuitableModel as error:
        raise ModelError(
            f"{model_name(model)} cannot read a sequence of tokens: {error}"
        ) from error
    logits = output.logits[0, -length:].float()
    if not logits.isfinite().all():
        raise ModelError(
            f"{model_name(model)} gives numbers that are not finite: its weights are damaged, or "
            "too large for its precision"
        )
    if not has_values:
        return logits, logits
    return logits, model.last_hidden_states(output)[0, -length:]


@torch.no_grad()
def sample_logits(model: Any) -> Tensor:
    """Logits (N, V), float32, on the CPU, of plain forwards of the self-check's sequences."""
    pairs = zip(*queries_and_responses(model), strict=True)
    with undisturbed(model), plain_layers():
        return torch.cat([plain_outputs(model, *pair)[0] for pair in pairs]).cpu()


def queries_and_responses(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences of `LENGTHS`, without tokens that stand for something other than text."""
    inner = language_model(model)
    config = inner.config
    count = inner.get_input_embeddings().weight.shape[0]
    if is_encoder_decoder(model):  # whose decoder may have fewer tokens than its encoder
        count = min(count, inner.get_output_embeddings().weight.shape[0])
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    reserved = {
        value
        for key, value in settings.items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ids = torch.tensor([i for i in range(min(count, 1000)) if i not in reserved] or [0])
    limits = context_length(inner), rope_switch(config)
    room = min((limit for limit in limits if limit is not None), default=100)
    half = max(room // 2, 1)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        chosen = torch.randint(len(ids), (min(length, half),), generator=generator)
        return ids[chosen].to(model.device)

    queries, responses = zip(*((draw(query), draw(new)) for query, new in LENGTHS), strict=True)
    return list(queries), list(responses)


def undisturbed(model: Any) -> AbstractContextManager[Any]:
    """Eval mode in the model's own precision; modes and random state are restored afterwards."""
    stack = ExitStack()
    stack.enter_context(modes_kept(model))
    stack.enter_context(no_autocast(model))
    stack.enter_context(RandomStream(0, torch.device(model.device)).active())
    model.eval()
    return stack


def language_model(model: Any) -> Any:
    """The language model of a policy, or the model itself."""
    return getattr(model, "pretrained_model", model)


def model_name(model: Any) -> str:
    """Folder or hub id of a model, or the name of its class."""
    inner = language_model(model)
    return str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__)
