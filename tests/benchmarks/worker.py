"""One measurement in a process of its own: a PPO batch with ppo-cli or with TRL 0.11.4.

python worker.py ppo_cli|trl|trl-batched tiny|gpt2 BATCH -> one JSON line on standard output.
`trl` samples one query at a time, as the tutorial's loop does; `trl-batched` as TRL can at best.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SHAPES = {
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 2048, "n_positions": 128},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}
WARM_UP, MEASURED = 1, 2


def main(implementation: str, shape: str, batch: int) -> None:
    """Measure sampling and `step()` on random weights; print seconds and peak memory."""
    warnings.filterwarnings("ignore")
    if implementation == "ppo_cli":
        from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    else:
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    torch.manual_seed(0)
    eos = SHAPES[shape]["vocab_size"] - 1
    words = {f"t{i}": i for i in range(eos + 1)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")),
        eos_token=f"t{eos}",
        pad_token=f"t{eos}",
    )
    network = GPT2LMHeadModel(GPT2Config(**SHAPES[shape], bos_token_id=eos, eos_token_id=eos))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(network)
    config = PPOConfig(batch_size=batch, mini_batch_size=batch, learning_rate=1e-5)
    trainer = PPOTrainer(config, model, None, tokenizer)
    pure = {"min_length": -1, "top_k": 0, "top_p": 1.0, "do_sample": True, "pad_token_id": eos}
    g = torch.Generator().manual_seed(0)

    def lengths(low: int, high: int) -> list[int]:
        return torch.randint(low, high, (batch,), generator=g).tolist()

    seconds: dict[str, list[float]] = {"sampling": [], "step": []}
    for _ in range(WARM_UP + MEASURED):
        queries = [torch.randint(0, eos, (n,), generator=g) for n in lengths(2, 8)]
        limits = lengths(4, 16)
        started = time.perf_counter()
        if implementation == "trl":
            responses = [
                trainer.generate(q, return_prompt=False, max_new_tokens=n, **pure).squeeze(0)
                for q, n in zip(queries, limits, strict=True)
            ]
        elif implementation == "trl-batched":
            whole = trainer.generate(
                queries, batch_size=batch, return_prompt=False, max_new_tokens=max(limits), **pure
            )
            responses = [r[:n] for r, n in zip(whole, limits, strict=True)]
        else:
            each = iter(limits)
            responses = trainer.generate(
                queries,
                length_sampler=lambda each=each: next(each),
                batch_size=batch,
                return_prompt=False,
                **pure,
            )
        seconds["sampling"].append(time.perf_counter() - started)
        scores = [torch.randn((), generator=g) for _ in queries]
        started = time.perf_counter()
        trainer.step(queries, responses, scores)
        seconds["step"].append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    best = {name: min(values[WARM_UP:]) for name, values in seconds.items()}
    print(json.dumps(best | {"batch": sum(best.values()), "peak_mib": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
