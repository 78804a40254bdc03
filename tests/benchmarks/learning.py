"""Seconds until the mean score reaches a height: the tutorial's loop, by this project or TRL.

python learning.py ours|ours-bf16|ours-shaped|trl|trl-batched POLICY CLASSIFIER REVIEWS
    [--goal G] [--steps N]

POLICY and CLASSIFIER are folders, REVIEWS a CSV file with a column `review` or `text`. Batch 64,
learning rate 3e-4, queries of 2 to 7 tokens, responses of 4 to 15, else 0.11.4's defaults;
`ours-shaped` also scores unfinished texts, calibrated, with lambda 0.7, one epoch and a value head
that starts at nothing. The height counts once the mean of five steps is there. Prints a JSON line
a step, then one in all.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, pipeline

BATCH = 64


def main() -> None:
    """Train until the goal is reached or the steps are over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=["ours", "ours-bf16", "ours-shaped", "trl", "trl-batched"])
    parser.add_argument("policy")
    parser.add_argument("classifier")
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--goal", type=float, default=1.2)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.who.startswith("ours"):
        from ppo_cli import (
            AutoModelForCausalLMWithValueHead,
            PPOConfig,
            PPOTrainer,
            SentimentReward,
        )
        from ppo_cli.models.sampling import to_texts
        from ppo_cli.rewards.partial_scores import potentials

        reward: Any = SentimentReward(arguments.classifier, "positive", device=device)
    else:
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        pipe = pipeline("sentiment-analysis", model=arguments.classifier, device=device)

        def reward(texts: list[str]) -> list[float]:
            outputs = pipe(texts, top_k=None, function_to_apply="none", batch_size=16)
            return [next(o["score"] for o in out if o["label"] == "POSITIVE") for out in outputs]

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.policy)
    tokenizer.pad_token = tokenizer.eos_token
    settings = {"batch_size": BATCH, "mini_batch_size": BATCH, "seed": arguments.seed}
    head: dict[str, Any] = {}
    if arguments.who == "ours-bf16":
        settings["accelerator_kwargs"] = {"mixed_precision": "bf16"}
    if arguments.who == "ours-shaped":
        settings |= {"lam": 0.7, "ppo_epochs": 1, "calibrate_potentials": True}
        head |= {"v_head_init_strategy": "normal", "v_head_initializer_range": 0.0}
    trainer = PPOTrainer(
        PPOConfig(learning_rate=3e-4, **settings),
        AutoModelForCausalLMWithValueHead.from_pretrained(arguments.policy, **head),
        AutoModelForCausalLMWithValueHead.from_pretrained(arguments.policy),
        tokenizer,
    )
    with arguments.reviews.open(encoding="utf-8", newline="") as file:
        rows = [row.get("review") or row.get("text") or "" for row in csv.DictReader(file)]
    g = torch.Generator().manual_seed(arguments.seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=g).tolist()

    reviews = [tokenizer(text).input_ids for text in rows if len(text) > 100]
    pure = {"min_length": -1, "top_k": 0, "top_p": 1.0, "do_sample": True}
    pure["pad_token_id"] = tokenizer.eos_token_id
    scores_so_far: list[float] = []
    started = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        chosen = draw(0, len(reviews), BATCH)
        queries = [
            torch.tensor(reviews[i][:n], device=device)
            for i, n in zip(chosen, draw(2, 8, BATCH), strict=True)
        ]
        limits = draw(4, 16, BATCH)
        if arguments.who == "trl":
            responses = [
                trainer.generate(q, return_prompt=False, max_new_tokens=n, **pure).squeeze(0)
                for q, n in zip(queries, limits, strict=True)
            ]
        elif arguments.who == "trl-batched":
            whole = trainer.generate(
                queries, batch_size=BATCH, return_prompt=False, max_new_tokens=15, **pure
            )
            responses = [r[:n] for r, n in zip(whole, limits, strict=True)]
        else:
            each = iter(limits)
            responses = trainer.generate(
                queries,
                batch_size=BATCH,
                return_prompt=False,
                length_sampler=lambda each=each: next(each),
                **pure,
            )
        texts = tokenizer.batch_decode(
            [torch.cat(pair) for pair in zip(queries, responses, strict=True)],
            skip_special_tokens=True,
        )
        scores = torch.tensor(list(map(float, reward(texts))))
        extra = {}
        if arguments.who == "ours-shaped":
            rollout = to_texts(tokenizer, queries, responses)
            extra["potentials"] = potentials(rollout, tokenizer, reward, every=1)
        stats = trainer.step(queries, responses, list(scores), **extra)
        scores_so_far.append(scores.mean().item())
        seconds = time.perf_counter() - started
        mean = sum(scores_so_far[-5:]) / len(scores_so_far[-5:])
        line = {"step": step, "seconds": seconds, "mean": mean, "kl": float(stats["objective/kl"])}
        print(json.dumps(line), flush=True)
        if mean >= arguments.goal:
            break
    print(json.dumps({"who": arguments.who, "reached": mean >= arguments.goal, **line}))


if __name__ == "__main__":
    main()
