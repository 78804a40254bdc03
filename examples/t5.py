"""An encoder-decoder: T5 reads the beginning of a review and learns to go on in a good mood.

    python examples/t5.py --output ppo-t5

The encoder reads a query with its end token, the decoder writes the response. `generate` returns
responses with the decoder's start token in front, and `step` takes them so. `ppo-cli train --set
policy.model=lvwerra/t5-imdb` trains such a model, too; there a response is scored alone unless the
`template` of a term of the reward says otherwise.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from ppo_cli import (
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    SentimentReward,
    create_reference_model,
    set_seed,
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lvwerra/t5-imdb")
    parser.add_argument("--classifier", default="lvwerra/distilbert-imdb")
    parser.add_argument("--sentiment", default="positive")
    parser.add_argument("--texts", default="stanfordnlp/imdb", help="dataset, or file of lines")
    parser.add_argument("--steps", type=int, default=194)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--output", default="ppo-t5")
    return parser.parse_args(argv)


def load_texts(source: str) -> list[str]:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").splitlines()
    return list(load_dataset(source, split="train")["text"])


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        mini_batch_size=min(16, args.batch_size),
    )
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    reward = SentimentReward(args.classifier, args.sentiment, device=trainer.accelerator.device)

    texts = load_texts(args.texts)
    input_length, output_length = LengthSampler(2, 8), LengthSampler(8, 16)
    means = []
    for step in range(1, args.steps + 1):
        chosen = tokenizer(random.choices(texts, k=args.batch_size), add_special_tokens=False)
        rows = [row[: input_length()] for row in chosen["input_ids"]]
        queries = [torch.tensor([*row, tokenizer.eos_token_id]) for row in rows]
        responses = trainer.generate(queries, batch_size=32, length_sampler=output_length)
        # The start token of T5's decoder is its pad token, which decoding leaves out.
        parts = zip(rows, tokenizer.batch_decode(responses, skip_special_tokens=True), strict=True)
        scores = list(reward([f"{tokenizer.decode(row)} {response}" for row, response in parts]))
        stats = trainer.step(queries, responses, scores)
        means.append(torch.stack(scores).mean().item())
        print(f"step {step}: reward {means[-1]:.3f}, KL {stats['objective/kl']:.3f}")
    trainer.save_pretrained(args.output)
    return means


if __name__ == "__main__":
    main()
