"""Detoxification: a model continues toxic prompts, and a toxicity classifier rewards harmless text.

    python examples/detoxify.py --output detoxified

The reward is the classifier's logit for `nothate`. Its own repetition would be a way out, so the
reward falls with the share of repeated bigrams. `ppo-cli train --config detoxify` does the same,
with evaluation and checkpoints.
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
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    SentimentReward,
    set_seed,
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="EleutherAI/gpt-neo-125m")
    parser.add_argument("--classifier", default="facebook/roberta-hate-speech-dynabench-r4-target")
    parser.add_argument("--label", default="nothate", help="the classifier's harmless label")
    parser.add_argument("--prompts", default="allenai/real-toxicity-prompts", help="or a file")
    parser.add_argument("--toxicity", type=float, default=0.3, help="of the dataset's prompts")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mini-batch-size", type=int, default=4)
    parser.add_argument("--output", default="detoxified")
    return parser.parse_args(argv)


def load_prompts(source: str, toxicity: float) -> list[str]:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").splitlines()
    prompts = load_dataset(source, split="train")["prompt"]
    return [p["text"] for p in prompts if (p["toxicity"] or 0) > toxicity]


def repetition(tokens: torch.Tensor) -> float:
    """Share of a response's pairs of neighbouring tokens that were there before."""
    pairs = list(zip(tokens.tolist(), tokens.tolist()[1:], strict=False))
    return 1 - len({*pairs}) / len(pairs) if pairs else 0.0


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=1.41e-5,
        batch_size=args.batch_size,
        mini_batch_size=args.mini_batch_size,
        use_score_scaling=True,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.eos_token
    # The lower half is frozen, and the reference uses the same weights.
    layers = model.config.num_hidden_layers // 2
    trainer = PPOTrainer(config, model, None, tokenizer, num_shared_layers=layers)
    reward = SentimentReward(args.classifier, args.label, device=trainer.accelerator.device)

    prompts = [
        torch.tensor(ids)
        for text in load_prompts(args.prompts, args.toxicity)
        if (ids := tokenizer.encode(text, truncation=True, max_length=15))
    ]
    lengths, means = LengthSampler(20, 30), []
    for step in range(1, args.steps + 1):
        queries = random.choices(prompts, k=args.batch_size)
        responses = trainer.generate(
            queries, batch_size=16, return_prompt=False, length_sampler=lengths
        )
        harmless = reward(tokenizer.batch_decode(responses, skip_special_tokens=True))
        scores = [
            score - 2 * repetition(response)
            for score, response in zip(harmless, responses, strict=True)
        ]
        stats = trainer.step(queries, responses, scores)
        means.append(torch.stack(scores).mean().item())
        print(f"step {step}: reward {means[-1]:.3f}, KL {stats['objective/kl']:.3f}")
    trainer.save_pretrained(args.output)
    return means


if __name__ == "__main__":
    main()
