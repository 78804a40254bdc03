"""One model, three sentiments: the control code before the text says which one it should write.

    python examples/control_codes.py --output ppo-control

Each query begins with `[positive]`, `[neutral]` or `[negative]`, drawn at random. With s the
classifier's logit for positive, the reward is s, -s, or, for neutral, what is left of a margin:
`margin - 2 |s|`. The classifier does not see the control code.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoTokenizer

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    SentimentReward,
    set_seed,
)

CODES = ("[positive]", "[neutral]", "[negative]")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lvwerra/gpt2-imdb")
    parser.add_argument("--classifier", default="lvwerra/distilbert-imdb")
    parser.add_argument("--texts", default="stanfordnlp/imdb", help="dataset, or file of lines")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.41e-5)
    parser.add_argument("--output", default="ppo-control")
    return parser.parse_args(argv)


def load_texts(source: str) -> list[str]:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").splitlines()
    return list(load_dataset(source, split="train")["text"])


def control_reward(code: str, positive: Tensor, margin: float = 4.0) -> Tensor:
    """The reward of a text, from its code and the logit for positive."""
    if code == "[neutral]":
        return margin - 2 * positive.abs()
    return positive if code == "[positive]" else -positive


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        mini_batch_size=args.batch_size,
        init_kl_coef=0.05,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = PPOTrainer(config, model, None, tokenizer)  # None: a frozen copy is the reference
    reward = SentimentReward(args.classifier, "positive", device=trainer.accelerator.device)

    code_ids = {code: tokenizer.encode(code) for code in CODES}
    starts = [
        tokenizer.encode(text, truncation=True, max_length=4) for text in load_texts(args.texts)
    ]
    lengths, means = LengthSampler(8, 20), []
    for step in range(1, args.steps + 1):
        codes = random.choices(CODES, k=args.batch_size)
        chosen = random.choices(starts, k=args.batch_size)
        queries = [
            torch.tensor(code_ids[code] + start) for code, start in zip(codes, chosen, strict=True)
        ]
        responses = trainer.generate(
            queries, batch_size=len(queries), return_prompt=False, length_sampler=lengths
        )
        texts = tokenizer.batch_decode(
            [start + response.tolist() for start, response in zip(chosen, responses, strict=True)],
            skip_special_tokens=True,
        )
        scores = [control_reward(*pair) for pair in zip(codes, reward(texts), strict=True)]
        stats = trainer.step(queries, responses, scores)
        by_code = {
            code: torch.stack([s for s, c in zip(scores, codes, strict=True) if c == code]).mean()
            for code in sorted({*codes})
        }
        shown = ", ".join(f"{code} {mean:.2f}" for code, mean in by_code.items())
        print(f"step {step}: {shown}, KL {stats['objective/kl']:.3f}")
        means.append(stats["ppo/mean_scores"])
    trainer.save_pretrained(args.output)
    return means


if __name__ == "__main__":
    main()
