"""A stand-in of vLLM below trl's own `VLLMGeneration`: the names that it uses.

As vLLM does, it loads its own copy of the weights from the disk, and gets others by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

OF_TRL = ("trl.generation.vllm_client", "trl.generation.vllm_generation")


@dataclass
class SamplingParams:
    """The settings of vLLM's class that are used."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] = field(default_factory=list)


class LLM:
    """An engine; `settings` are what it was made with, `loaded` the names that it was given."""

    made: ClassVar[list[LLM]] = []

    def __init__(self, model: str, **settings: Any) -> None:
        if settings["gpu_memory_utilization"] > 1:
            raise ValueError("gpu_memory_utilization must be 1 at most")
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)
        self.loaded: list[str] = []
        self.made.append(self)

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, value in weights:
            own[name].data.copy_(value)
            self.loaded.append(name)

    def reset_prefix_cache(self) -> None:
        """Nothing is kept here."""

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, use_tqdm: bool
    ) -> list[Any]:
        """Draw a completion of each prompt."""
        return [self._complete(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _complete(self, prompt: list[int], params: SamplingParams) -> Any:
        own_end = [] if params.ignore_eos else [self.model.config.eos_token_id]
        ends = {*params.stop_token_ids, *own_end}
        drawn: list[int] = []
        logprobs = []
        while len(drawn) < params.max_tokens and (not drawn or drawn[-1] not in ends):
            logits = self.model(torch.tensor([prompt + drawn])).logits[0, -1]
            processed = (logits / params.temperature).log_softmax(-1)
            token = int(torch.multinomial(processed.exp().nan_to_num(1), 1))
            drawn.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(processed[token]), rank=1)})
        completion = SimpleNamespace(token_ids=drawn, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[completion])


MODULES: dict[str, dict[str, Any]] = {
    "vllm": {
        "LLM": LLM,
        "RequestOutput": SimpleNamespace,
        "SamplingParams": SamplingParams,
        "__version__": "0.31.0",
    },
    "vllm.sampling_params": {"StructuredOutputsParams": SimpleNamespace},
    "vllm.utils": {},
    "vllm.utils.network_utils": {"get_ip": str},
    "vllm.distributed": {},
    "vllm.distributed.weight_transfer": {},
    "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": print},
    "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": print},
}


@contextmanager
def installed() -> Iterator[list[LLM]]:
    """Inside the block vLLM is there; gives the list of its engines.

    trl makes the process a group of one by variables of the environment, which end with the block:
    later tests of the process would be members of it.
    """
    variables = dict(os.environ)
    before = {name: sys.modules.pop(name, None) for name in OF_TRL}
    for name, content in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=True)
        sys.modules[name] = module
    LLM.made.clear()
    try:
        yield LLM.made
    finally:
        for name in (*MODULES, *OF_TRL):
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module})
        os.environ.clear()
        os.environ.update(variables)
