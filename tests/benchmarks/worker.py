"""One measurement in a process of its own; prints one JSON line.

python worker.py batch WHO MODEL BATCH PRECISION     a PPO batch, sampled and learnt from
python worker.py peak                                this machine's matrix products, GFLOP/s

WHO is `ours`, `trl` (one query at a time, as the tutorial's loop samples) or `trl-batched`. MODEL
is `gpt2`, `tiny` or LAYERSxWIDTH. Queries have 2 to 7 tokens, responses up to 4 to 15 (or, with the
environment variable RESPONSE, that many). Weights are random, the best of the repetitions counts.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from typing import Any

import torch

TINY, GPT2 = (4, 128, 2048), (12, 768, 50257)  # layers, width, vocabulary
EPOCHS, FORWARD_AND_BACKWARD = 4, 3
REPETITIONS = int(os.environ.get("REPETITIONS", "3"))


def peak() -> dict[str, float]:
    """GFLOP/s of the best product that torch offers, in each precision that is native here."""
    from ppo_cli.runtime import computes_bfloat16

    dtypes = {"fp32": torch.float32}
    if computes_bfloat16(torch.device("cpu")):
        dtypes["bf16"] = torch.bfloat16
    size = 2048
    best = {}
    for name, dtype in dtypes.items():
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        ways = [lambda: a @ b]  # noqa: B023
        if torch.backends.mkldnn.is_available():
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))  # noqa: B023
        seconds = min(timed(way) for way in ways for _ in range(8))
        best[name] = 2 * size**3 / seconds / 1e9
    return best


def timed(call: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def batch(who: str, model: str, size: int, precision: str) -> dict[str, float]:
    """Seconds and peak memory of sampling and `step()`, and the step's useful GFLOP."""
    warnings.filterwarnings("ignore")
    if who == "ours":
        from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    else:
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    named = {"tiny": TINY, "gpt2": GPT2}
    layers, width, vocabulary = named.get(model) or (*map(int, model.split("x")), 50257)
    eos = vocabulary - 1
    response = int(os.environ.get("RESPONSE", "0"))
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
        ),
        eos_token=f"t{eos}",
        pad_token=f"t{eos}",
    )
    shape = {"n_layer": layers, "n_embd": width, "n_head": max(width // 64, 1)}
    network = GPT2LMHeadModel(
        GPT2Config(**shape, vocab_size=vocabulary, bos_token_id=eos, eos_token_id=eos)
    )
    settings: dict[str, Any] = {"mini_batch_size": min(size, 128)}
    if precision == "bf16":
        settings["accelerator_kwargs"] = {"mixed_precision": "bf16"}
    trainer = PPOTrainer(
        PPOConfig(batch_size=size, learning_rate=1e-5, **settings),
        AutoModelForCausalLMWithValueHead.from_pretrained(network),
        None,
        tokenizer,
    )
    pure = {"min_length": -1, "top_k": 0, "top_p": 1.0, "do_sample": True, "pad_token_id": eos}
    g = torch.Generator().manual_seed(0)

    def lengths(low: int, high: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=g).tolist()

    def sample(queries: list[torch.Tensor], limits: list[int]) -> list[torch.Tensor]:
        if who == "trl":
            return [
                trainer.generate(q, return_prompt=False, max_new_tokens=n, **pure).squeeze(0)
                for q, n in zip(queries, limits, strict=True)
            ]
        listed = {"batch_size": min(size, 128), "return_prompt": False, **pure}
        if who == "ours":
            each = iter(limits)
            return trainer.generate(queries, length_sampler=lambda: next(each), **listed)
        with trainer.accelerator.autocast():
            whole = trainer.generate(queries, max_new_tokens=max(limits), **listed)
        return [r[:n] for r, n in zip(whole, limits, strict=True)]

    results = []
    for _ in range(REPETITIONS):
        queries = [torch.randint(0, eos, (n,), generator=g) for n in lengths(2, 8)]
        limits = [response] * size if response else lengths(4, 16)
        started = time.perf_counter()
        responses = sample(queries, limits)
        sampled = time.perf_counter()
        trainer.step(queries, responses, [torch.randn((), generator=g) for _ in queries])
        results.append((sampled - started, time.perf_counter() - sampled))
    answered = sum(map(len, responses))
    tokens = sum(map(len, queries)) + answered
    # Needed: the policy forward and backward in each epoch, the reference forward, on all tokens
    # but each sequence's last, which predicts nothing; the projection where a response token
    # follows.
    trunk = 2 * 12 * layers * width**2 * (tokens - size)
    useful = (EPOCHS * FORWARD_AND_BACKWARD + 1) * (trunk + 2 * vocabulary * width * answered)
    sampling, step = (min(column) for column in zip(*results[1:] or results, strict=True))
    return {
        "sampling": sampling,
        "step": step,
        "batch": sampling + step,
        "tokens": tokens,
        "step_gflop": useful / 1e9,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(peak() if what == "peak" else batch(rest[0], rest[1], int(rest[2]), rest[3])))
