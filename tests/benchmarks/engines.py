"""Tokens a second of the sampling engines, in turns in one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/engines.py [--rounds N] [--engines transformers,paged]

GPT-2 small has random weights; `embedded` is the model that comes with the program. Queries have 2
to 8 tokens. Printed is a Markdown table: the best round of each engine and, as the machine may have
other work, the load.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_cli.config.schema import RolloutConfig
from ppo_cli.data.embedded import policy_folder
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.ppo.engines import make_engine

# Model, batch, sequences at once, lengths of the responses, over and over.
WORKLOADS: list[tuple[str, int, int | None, list[int]]] = [
    ("embedded", 64, None, [*range(12, 24)]),
    ("embedded", 128, None, [*range(12, 24)]),
    ("embedded", 64, None, [*range(12, 120)]),
    ("embedded", 128, 16, [*[8] * 7, 120]),
    ("GPT-2 small", 16, None, [*range(4, 16)]),
    ("GPT-2 small", 16, None, [*range(32, 96, 4)]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="transformers,paged")
    asked = parser.parse_args()
    engines = asked.engines.split(",")
    torch.manual_seed(0)
    embedded = GPT2LMHeadModel.from_pretrained(policy_folder())
    models = {"embedded": embedded, "GPT-2 small": GPT2LMHeadModel(GPT2Config())}
    print(f"{torch.get_num_threads()} threads, tokens a second")
    print(f"| model | batch | at once | responses | precision | {' | '.join(engines)} | load |")
    print(f"|---|---:|---:|---|---|{'---:|' * (len(engines) + 1)}")
    for precision in ("no", "bf16"):
        for name, batch, rows, lengths in WORKLOADS:
            rates = measure(models[name], batch, rows, lengths, precision, engines, asked.rounds)
            shown = " | ".join(f"{rate:,.0f}" for rate in rates)
            what = f"{name} | {batch} | {rows or batch} | {min(lengths)} to {max(lengths)}"
            print(f"| {what} | {precision} | {shown} | {os.getloadavg()[0]:.1f} |", flush=True)


def measure(
    model: Any,
    batch: int,
    rows: int | None,
    lengths: list[int],
    precision: str,
    engines: list[str],
    rounds: int,
) -> list[float]:
    """Tokens a second of each engine, in its best round."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = PPOConfig(
        batch_size=batch, mini_batch_size=batch, accelerator_kwargs={"mixed_precision": precision}
    )
    tokenizer = AutoTokenizer.from_pretrained(policy_folder())
    policy = AutoModelForCausalLMWithValueHead(model)
    trainer = PPOTrainer(config, policy, None, tokenizer)
    drawn = np.random.RandomState(0)
    queries = [torch.as_tensor(drawn.randint(0, 70, drawn.randint(2, 9))) for _ in range(batch)]
    limits = list(islice(cycle(lengths), batch))
    sizes: dict[str, Any] = {"output_max_length": max(lengths) + 1, "batch_size": rows}
    made = [make_engine(RolloutConfig(engine=e, **sizes), trainer, queries) for e in engines]  # type: ignore[arg-type]
    best = [0.0] * len(made)
    for _ in range(rounds + 1):  # the first has costs of its own, and is never the best
        for i, engine in enumerate(made):
            engine.refresh()
            started = time.perf_counter()
            engine.sample(queries, limits, SamplingParams())
            best[i] = max(best[i], sum(limits) / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
