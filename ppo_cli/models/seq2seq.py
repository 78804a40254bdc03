"""The policy of an encoder-decoder, such as T5 or BART: a value head beside its decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from ppo_cli.models.capabilities import PADDED_READING, Reading
from ppo_cli.models.encoder_decoder import auto_class, refuse_if_not_seq2seq
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead


class AutoModelForSeq2SeqLMWithValueHead(AutoModelForCausalLMWithValueHead):
    """An encoder-decoder (`pretrained_model`) with a `ValueHead` (`v_head`) beside it.

    Make one with `from_pretrained`; arguments, files and methods are those of
    `AutoModelForCausalLMWithValueHead`. The encoder reads queries, the decoder writes responses,
    and the value head reads the decoder's last hidden states. `forward` takes `decoder_input_ids`
    (B, T) and `decoder_attention_mask` as well; T is then their length.

    Raises:
        UsageError: the model is not an encoder-decoder.
    """

    transformers_parent_class = AutoModelForSeq2SeqLM
    is_encoder_decoder = True

    @staticmethod
    def _check_kind(config: Any, model_class: type) -> None:
        refuse_if_not_seq2seq(config, model_class)

    def allows(self, capability: Callable[[Any], bool]) -> bool:
        """False: each of those capabilities is a way to read or to sample one row of tokens."""
        return False

    def _fastest_reading(self) -> Reading:
        return PADDED_READING

    def _read_length(self, input_ids: Tensor | None, logits: Tensor) -> int:
        return logits.shape[1]

    def _last_states(self, output: Any) -> Tensor:
        states: Tensor = output.decoder_hidden_states[-1]
        return states


def with_value_head(model: PreTrainedModel) -> AutoModelForCausalLMWithValueHead:
    """A new value head beside a model of either kind."""
    return policy_class(model.config)(model)


def policy_class(config: Any) -> type[AutoModelForCausalLMWithValueHead]:
    """The class of policies that a model with this configuration belongs into."""
    if auto_class(config) is AutoModelForSeq2SeqLM:
        return AutoModelForSeq2SeqLMWithValueHead
    return AutoModelForCausalLMWithValueHead
