"""One measurement in a process of its own; prints one JSON line.

python worker.py batch WHO MODEL BATCH PRECISION     a PPO batch, sampled and learnt from
python worker.py peak                                this machine's matrix products, GFLOP/s

WHO is `ours`, `trl` (one query at a time, as the tutorial's loop samples) or `trl-batched`. MODEL
is `gpt2`, `tiny` or LAYERSxWIDTH. Queries have 2 to 7 tokens, responses up to 4 to 15 (or, with the
environment variable RESPONSE, that many). Weights are random, the best of the repetitions counts.
On a machine with a GPU all of this happens there, and memory is what torch allocated on it.
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY, GPT2 = (4, 128, 2048), (12, 768, 50257)  # layers, width, vocabulary
EPOCHS, FORWARD_AND_BACKWARD = 4, 3
REPETITIONS = int(os.environ.get("REPETITIONS", "3"))


def peak() -> dict[str, float]:
    """GFLOP/s of the best product that torch offers, in each precision that is native here."""
    from ppo_cli.utils.device import computes_bfloat16

    dtypes = {"fp32": torch.float32}
    if computes_bfloat16(torch.device(DEVICE)):
        dtypes["bf16"] = torch.bfloat16
    size = 2048 if DEVICE == "cpu" else 8192
    best = {}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
        ways = [lambda: a @ b]  # noqa: B023
        if DEVICE == "cpu" and torch.backends.mkldnn.is_available():
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))  # noqa: B023
        seconds = min(timed(way) for way in ways for _ in range(8))
        best[name] = 2 * size**3 / seconds / 1e9
    return best


def timed(call: Any) -> float:
    """Seconds that a call takes."""
    started = now()
    call()
    return now() - started


def now() -> float:
    """Seconds, once the GPU has done all that it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib() -> float:
    """The most memory that was held at once: this process's, or torch's on the GPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Workload:
    """A trainer of `ours` or TRL's, and batches for it.

    Attributes:
        trainer: a `PPOTrainer`.
    """

    def __init__(self, who: str, model: str, size: int, precision: str) -> None:
        warnings.filterwarnings("ignore")
        if who == "ours":
            from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
            from ppo_cli.kernels.kernel_caches import limit_kernel_caches

            limit_kernel_caches()
        else:
            from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        named = {"tiny": TINY, "gpt2": GPT2}
        shape = named.get(model) or (*map(int, model.split("x")), 50257)
        self.layers, self.width, self.vocabulary = shape
        self.who, self.size, self.eos = who, size, self.vocabulary - 1
        torch.manual_seed(0)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(
                WordLevel({f"t{i}": i for i in range(self.vocabulary)}, unk_token="t0")
            ),
            eos_token=f"t{self.eos}",
            pad_token=f"t{self.eos}",
        )
        network = GPT2LMHeadModel(
            GPT2Config(
                n_layer=self.layers,
                n_embd=self.width,
                n_head=max(self.width // 64, 1),
                vocab_size=self.vocabulary,
                bos_token_id=self.eos,
                eos_token_id=self.eos,
            )
        )
        settings: dict[str, Any] = {"mini_batch_size": min(size, 128)}
        if precision == "bf16":
            settings["accelerator_kwargs"] = {"mixed_precision": "bf16"}
        self.trainer: Any = PPOTrainer(
            PPOConfig(batch_size=size, learning_rate=1e-5, **settings),
            AutoModelForCausalLMWithValueHead.from_pretrained(network),
            None,
            tokenizer,
        )
        self.generator = torch.Generator().manual_seed(0)

    def draw(self) -> tuple[list[torch.Tensor], list[int]]:
        """Queries, and how many tokens at most their responses have."""
        queries = [
            torch.randint(0, self.eos, (n,), generator=self.generator).to(DEVICE)
            for n in self._lengths(2, 8)
        ]
        response = int(os.environ.get("RESPONSE", "0"))
        return queries, [response] * self.size if response else self._lengths(4, 16)

    def sample(self, queries: list[torch.Tensor], limits: list[int]) -> list[torch.Tensor]:
        """A response each."""
        pure: dict[str, Any] = {"min_length": -1, "top_k": 0, "top_p": 1.0, "do_sample": True}
        pure |= {"pad_token_id": self.eos, "return_prompt": False}
        if self.who == "trl":
            return [
                self.trainer.generate(q, max_new_tokens=n, **pure).squeeze(0)
                for q, n in zip(queries, limits, strict=True)
            ]
        pure["batch_size"] = min(self.size, 128)
        if self.who == "ours":
            each = iter(limits)
            return self.trainer.generate(queries, length_sampler=lambda: next(each), **pure)
        with self.trainer.accelerator.autocast():
            whole = self.trainer.generate(queries, max_new_tokens=max(limits), **pure)
        return [r[:n] for r, n in zip(whole, limits, strict=True)]

    def step(self, queries: list[torch.Tensor], responses: list[torch.Tensor]) -> None:
        """Learn, from scores at random."""
        scores = [torch.randn((), generator=self.generator) for _ in queries]
        self.trainer.step(queries, responses, scores)

    def step_flop(self, tokens: int, answered: int) -> float:
        """What a step has to compute: the policy forward and backward each epoch, the reference.

        On all tokens but each sequence's last, which predicts nothing; the projection where one of
        the `answered` response tokens follows.
        """
        trunk = 2 * 12 * self.layers * self.width**2 * (tokens - self.size)
        head = 2 * self.vocabulary * self.width * answered
        return (EPOCHS * FORWARD_AND_BACKWARD + 1) * (trunk + head)

    def _lengths(self, low: int, high: int) -> list[int]:
        return torch.randint(low, high, (self.size,), generator=self.generator).tolist()


def batch(who: str, model: str, size: int, precision: str) -> dict[str, float]:
    """Seconds and peak memory of sampling and `step()`, and the step's useful GFLOP."""
    work = Workload(who, model, size, precision)
    results = []
    for _ in range(REPETITIONS):
        queries, limits = work.draw()
        started = now()
        responses = work.sample(queries, limits)
        sampled = now()
        work.step(queries, responses)
        results.append((sampled - started, now() - sampled))
    answered = sum(map(len, responses))
    tokens = sum(map(len, queries)) + answered
    sampling, step = (min(column) for column in zip(*results[1:] or results, strict=True))
    return {
        "sampling": sampling,
        "step": step,
        "batch": sampling + step,
        "tokens": tokens,
        "step_gflop": work.step_flop(tokens, answered) / 1e9,
        "peak_mib": peak_mib(),
    }


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(peak() if what == "peak" else batch(rest[0], rest[1], int(rest[2]), rest[3])))
