"""The classic tutorial as a script: GPT-2 learns to write positive (or negative) movie reviews.

    python examples/sentiment.py --output ppo-good
    python examples/sentiment.py --sentiment negative --output ppo-bad

A query is the beginning of a review, the reward the classifier's logit for the sentiment. `ppo-cli
train --config gpt2-imdb` does the same, with evaluation, checkpoints and plots.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    SentimentReward,
    create_reference_model,
    set_seed,
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lvwerra/gpt2-imdb")
    parser.add_argument("--classifier", default="lvwerra/distilbert-imdb")
    parser.add_argument("--sentiment", default="positive")
    parser.add_argument("--texts", default="stanfordnlp/imdb", help="dataset, or file of lines")
    parser.add_argument("--steps", type=int, default=194)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.41e-5)
    parser.add_argument("--output", default="ppo-good")
    return parser.parse_args(argv)


def load_texts(source: str) -> list[str]:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").splitlines()
    return list(load_dataset(source, split="train")["text"])


def build_dataset(source: str, tokenizer: Any) -> Dataset:
    """Queries: the first 2 to 7 tokens of each review."""
    length = LengthSampler(2, 8)
    texts = [text for text in load_texts(source) if len(text) > 200]
    rows = [tokenizer.encode(text, truncation=True, max_length=8)[: length()] for text in texts]
    dataset = Dataset.from_dict({"input_ids": rows, "query": tokenizer.batch_decode(rows)})
    return dataset.with_format("torch")


def collator(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        mini_batch_size=args.batch_size,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model)
    ref_model = create_reference_model(model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.eos_token
    dataset = build_dataset(args.texts, tokenizer)
    trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset, data_collator=collator)
    reward = SentimentReward(args.classifier, args.sentiment, device=trainer.accelerator.device)

    lengths = LengthSampler(4, 16)
    means: list[float] = []
    while len(means) < args.steps:
        for batch in trainer.dataloader:
            queries = batch["input_ids"]
            responses = trainer.generate(
                queries, batch_size=len(queries), return_prompt=False, length_sampler=lengths
            )
            batch["response"] = tokenizer.batch_decode(responses)
            texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
            scores = list(reward(texts))
            stats = trainer.step(queries, responses, scores)
            trainer.log_stats(stats, batch, scores)
            means.append(torch.stack(scores).mean().item())
            print(f"step {len(means)}: reward {means[-1]:.3f}, KL {stats['objective/kl']:.3f}")
            if len(means) == args.steps:
                break
    trainer.save_pretrained(args.output)
    return means


if __name__ == "__main__":
    main()
