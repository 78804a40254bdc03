"""Long prompts with a reward model: an adapter learns to answer questions that people rate well.

    python examples/long_prompts.py --output answers

A reward model with one output rates question and answer together. Rows are long, so mini-batches
are small, gradients are accumulated over them and activations are recomputed; only an adapter is
trained, and the model without it is the reference. The value head learns alone at first.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    SentimentReward,
    set_seed,
)

TEMPLATE = "Question: {}\n\nAnswer:"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--reward-model", default="OpenAssistant/reward-model-deberta-v3-large-v2")
    parser.add_argument("--label", default="0", help="of the reward model: its only output")
    parser.add_argument("--questions", default="tatsu-lab/alpaca", help="or a file of lines")
    parser.add_argument("--max-prompt-tokens", type=int, default=384)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", default="answers")
    return parser.parse_args(argv)


def load_questions(source: str) -> list[str]:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").splitlines()
    rows = load_dataset(source, split="train")
    return [f"{row['instruction']} {row['input']}".strip() for row in rows]


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=1e-4,
        batch_size=args.batch_size,
        mini_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        value_warmup_steps=min(5, args.steps - 1),
        max_grad_norm=1.0,
        use_score_scaling=True,
        use_score_norm=True,  # the model's ratings have any mean
        target=8.0,  # nats of KL
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model, peft_config=adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = PPOTrainer(config, model, None, tokenizer)
    reward = SentimentReward(
        args.reward_model, args.label, batch_size=8, device=trainer.accelerator.device
    )

    prompts = [TEMPLATE.format(question) for question in load_questions(args.questions)]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    kept = [i for i, row in enumerate(ids) if len(row) <= args.max_prompt_tokens]
    print(f"{len(kept)} of {len(ids)} prompts have at most {args.max_prompt_tokens} tokens")
    means: list[float] = []
    for step in range(1, args.steps + 1):
        chosen = random.choices(kept, k=args.batch_size)
        queries = [torch.tensor(ids[i]) for i in chosen]
        responses = trainer.generate(
            queries,
            batch_size=8,
            return_prompt=False,
            max_new_tokens=args.max_new_tokens,
        )
        answers = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = list(reward([prompts[i] + a for i, a in zip(chosen, answers, strict=True)]))
        stats = trainer.step(queries, responses, scores)
        means.append(torch.stack(scores).mean().item())
        length = stats["tokens/responses_len_mean"]
        kl = stats["objective/kl"]
        print(f"step {step}: reward {means[-1]:.3f}, KL {kl:.3f}, {length:.0f} tokens an answer")
    trainer.save_pretrained(args.output)
    return means


if __name__ == "__main__":
    main()
