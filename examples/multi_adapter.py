"""Multi-adapter RL: one base model, an adapter as the policy and another one as the reward model.

    python examples/multi_adapter.py --reward-adapter my-reward-adapter --output ppo-adapter

The reward adapter is one that peft saved of AutoModelForSequenceClassification on the same base,
with task_type SEQ_CLS. The base is in memory once: it is the policy with one adapter, the reward
model with the other, and the reference without either.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    set_seed,
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="huggyllama/llama-7b")
    parser.add_argument("--reward-adapter", default="trl-lib/llama-7b-hh-rm-adapter")
    parser.add_argument("--label", type=int, default=-1, help="index of the reward model's label")
    parser.add_argument("--texts", default="Anthropic/hh-rlhf", help="dataset, or file of lines")
    parser.add_argument("--dtype", default="bfloat16", help="of the base; adapters are float32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default="ppo-adapter")
    return parser.parse_args(argv)


def load_texts(source: str) -> list[str]:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").splitlines()
    return list(load_dataset(source, split="train")["chosen"])


def rewards(
    policy: AutoModelForCausalLMWithValueHead, rows: list[Tensor], label: int
) -> list[Tensor]:
    """The reward adapter's score at the last token of each row."""
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    ids = pad_sequence(rows, batch_first=True).to(policy.device)
    mask = (torch.arange(ids.shape[1], device=policy.device) < lengths[:, None]).long()
    scores = policy.compute_reward_score(ids, mask)
    return list(scores[torch.arange(len(rows)), lengths - 1, label])


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save the policy's adapter, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=1e-4,
        batch_size=args.batch_size,
        mini_batch_size=2,
        use_score_scaling=True,
        use_score_norm=True,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        args.model,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05),
        reward_adapter=args.reward_adapter,
        dtype=getattr(torch, args.dtype),
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = PPOTrainer(config, model, None, tokenizer)
    policy = trainer.accelerator.unwrap_model(trainer.model)

    starts = [
        torch.tensor(ids)
        for text in load_texts(args.texts)
        if (ids := tokenizer.encode(text, truncation=True, max_length=32))
    ]
    lengths, means = LengthSampler(8, 32), []
    for step in range(1, args.steps + 1):
        queries = random.choices(starts, k=args.batch_size)
        responses = trainer.generate(
            queries, batch_size=8, return_prompt=False, length_sampler=lengths
        )
        whole = [torch.cat([q.to(r.device), r]) for q, r in zip(queries, responses, strict=True)]
        scores = rewards(policy, whole, args.label)
        stats = trainer.step(queries, responses, scores)
        means.append(torch.stack(scores).mean().item())
        print(f"step {step}: reward {means[-1]:.3f}, KL {stats['objective/kl']:.3f}")
    trainer.save_pretrained(args.output)  # the policy's adapter and the value head
    return means


if __name__ == "__main__":
    main()
