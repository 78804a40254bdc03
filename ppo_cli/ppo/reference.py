"""The reference of a `PPOTrainer`: the model from which KL is measured."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from ppo_cli.errors import UsageError
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.reference import (
    create_adapter_reference,
    create_reference_model,
    refuse_shared_weights,
    starts_as_its_base,
)
from ppo_cli.models.seq2seq import with_value_head
from ppo_cli.ppo.accelerator import require
from ppo_cli.ppo.sharding import shard_reference


def make_reference(
    model: AutoModelForCausalLMWithValueHead,
    ref_model: AutoModelForCausalLMWithValueHead | PreTrainedModel | None,
    num_shared_layers: int | None,
) -> AutoModelForCausalLMWithValueHead | None:
    """The reference of `model`; None where it is the policy itself with its adapter off.

    Arguments as in `PPOTrainer`.

    Raises:
        ValueError: `ref_model` is no model.
        UsageError: `ref_model` shares trained weights with `model`, or the layers to share are not
            there.
    """
    if ref_model is not None:
        require("ref_model", ref_model, (AutoModelForCausalLMWithValueHead, PreTrainedModel))
        if num_shared_layers is not None:
            warnings.warn("num_shared_layers is ignored: ref_model was passed", stacklevel=3)
        if isinstance(ref_model, PreTrainedModel):  # for its forward; the head is not used
            ref_model = with_value_head(ref_model)
        if ref_model.is_encoder_decoder != model.is_encoder_decoder:
            raise UsageError("model and ref_model must both be encoder-decoders, or neither")
        refuse_shared_weights(model, ref_model)
        return ref_model
    if not model.is_peft_model:
        return create_reference_model(model, num_shared_layers)
    # The policy at its start, which includes an adapter that was trained before.
    return None if starts_as_its_base(model) else create_adapter_reference(model)


def prepare_reference(reference: Any, accelerator: Accelerator) -> Any:
    """Place the reference on the policy's device, sharded like the policy, in eval mode.

    None, the reference of a policy whose adapter can be switched off, stays None.
    """
    if reference is None:
        return None
    if accelerator.is_fsdp2:
        return shard_reference(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True).eval()
