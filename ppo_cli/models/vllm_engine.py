"""Sampling by vLLM, through trl's `VLLMGeneration`, which hands it the policy's weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppo_cli.errors import ModelError, UsageError, is_out_of_memory
from ppo_cli.models.decode_loop import not_finite
from ppo_cli.models.engine import EngineSamples, check_options
from ppo_cli.models.quantization import is_quantized
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.utils.text import shortened

MEMORY = 0.3  # share of the GPU's; the rest is for the update. trl's trainers have the same default
OURS = ("self", "model", "accelerator", "processing_class", "max_num_seqs", "trust_remote_code",
        "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_completion_length",
        "logprobs", "generation_kwargs", "structured_outputs_regex")  # fmt: skip
"""Parameters of `VLLMGeneration` that are set here."""


class VLLMEngine:
    """Samples from vLLM's own copy of the policy's weights.

    Args:
        policy: the policy, which keeps its weights: an adapter is merged and taken out again.
        accelerator: the trainer's.
        tokenizer: the policy's.
        longest: tokens of the longest query with its response.
        rows: sequences at once at most; None for vLLM's choice.
        is_trusted: whether vLLM may run the model's own code.
        options: further arguments of `VLLMGeneration`.

    Raises:
        UsageError: there is no such argument, or the policy is quantised.
        ModelError: vLLM does not start.
    """

    def __init__(
        self,
        policy: Any,
        accelerator: Any,
        tokenizer: Any,
        *,
        longest: int,
        rows: int | None = None,
        is_trusted: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from trl.generation.vllm_generation import VLLMGeneration

        known = set(inspect.signature(VLLMGeneration.__init__).parameters) - {*OURS}
        check_options(options or {}, known, "VLLMGeneration")
        if is_quantized(policy):
            raise UsageError(
                "rollout.engine=vllm needs whole weights: an adapter cannot be merged into a "
                "quantised base and taken out again. Leave policy.quantization out, or set "
                "rollout.engine=paged"
            )
        self._policy = policy
        self._frozen = _below_adapters(policy)
        settings = {"gpu_memory_utilization": MEMORY, "max_model_length": longest}
        with _vllm_errors("does not start"):
            self._vllm: Any = VLLMGeneration(
                model=policy.pretrained_model,
                accelerator=accelerator,
                processing_class=tokenizer,
                max_num_seqs=rows,
                trust_remote_code=is_trusted,
                logprobs=0,  # of the drawn token alone
                **settings | dict(options or {}),
            )

    def refresh(self) -> None:
        """Hand the policy's weights to vLLM, the adapter merged into them."""
        with _vllm_errors("does not take the policy's weights"):
            try:
                self._vllm.sync_weights()
            finally:
                # Merged and taken out again, weights differ in their last digits, more each time.
                with torch.no_grad():
                    for parameter, value in self._frozen:
                        parameter.copy_(value)

    def sample(
        self,
        queries: Sequence[Tensor],
        limits: Sequence[int],
        params: SamplingParams,
        uniforms: Tensor | None = None,
    ) -> EngineSamples:
        """Draw a response to each query, see `SamplingEngine`.

        vLLM has one limit for all; what is beyond a response's own is cut off.
        """
        vllm = self._vllm
        vllm.temperature, vllm.top_k, vllm.top_p = params.temperature, params.top_k, params.top_p
        vllm.max_completion_length = max(limits)
        # The end tokens of the model's configurations are among ours.
        vllm.generation_kwargs = {
            "ignore_eos": True,
            "stop_token_ids": list(params.stop_token_ids),
        }
        with _vllm_errors("does not sample"):
            _, drawn, logprobs, _ = vllm.generate(
                [query.tolist() for query in queries], None, num_generations=1
            )
        device = self._policy.device
        responses = [
            torch.tensor(tokens[:limit], device=device)
            for tokens, limit in zip(drawn, limits, strict=True)
        ]
        if logprobs is None:
            return EngineSamples(responses, None)
        kept = [
            [of_token[0] for of_token in of_row[:limit]]
            for of_row, limit in zip(logprobs, limits, strict=True)
        ]
        if any(value is None for row in kept for value in row):  # trl's sign for NaN
            raise not_finite()
        return EngineSamples(responses, [torch.tensor(row, dtype=torch.float32) for row in kept])


def _below_adapters(policy: Any) -> list[tuple[Tensor, Tensor]]:
    """The frozen parameters that merging changes, each with a copy on the CPU."""
    if not policy.is_peft_model:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    frozen = {p: None for layer in layers for p in layer.get_base_layer().parameters()}
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in frozen]


@contextmanager
def _vllm_errors(does: str) -> Iterator[None]:
    """Errors of vLLM as one message.

    Raises:
        ModelError: vLLM raised something other than lack of memory.
    """
    try:
        yield
    except Exception as error:  # whatever a library of this size raises
        if is_out_of_memory(error):
            raise
        said = shortened(str(error).strip() or type(error).__name__, 200)
        raise ModelError(
            f"rollout.engine=vllm: vLLM {does}: {said}. See rollout.engine_kwargs, or set "
            "rollout.engine to transformers or paged"
        ) from error
