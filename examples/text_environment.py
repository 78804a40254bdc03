"""Tools in a text environment: a model learns to compute with a calculator instead of guessing.

    python examples/text_environment.py --output calculating

The model writes `<request><calculator>12*(3+4)<call>`, the environment answers `84<response>`, and
the model submits: `Result = 84<submit>`. The calculator's answer is part of the response, but
masked: the model does not learn to write it. The reward is 1 for the right result, else 0.
"""

from __future__ import annotations

import argparse
import ast
import operator
import random
import re
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    TextEnvironment,
    set_seed,
)

PROMPT = """\
What is 13-3?
<request><calculator>13-3<call>10<response>
Result = 10<submit>

What is 4*(5+3)?
<request><calculator>4*(5+3)<call>32<response>
Result = 32<submit>

"""
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", default="calculating")
    return parser.parse_args(argv)


def calculator(query: str) -> int:
    """The value of a sum or product of numbers; anything else is an error that the model reads."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError("only +, -, * and whole numbers")

    return value(ast.parse(query.strip(), mode="eval").body)


def exact_match(texts: list[str], results: list[int]) -> list[torch.Tensor]:
    """1 where the last segment of an episode submits the right result."""
    found = [re.search(r"Result\s*=\s*(-?\d+)\s*<submit>", text) for text in texts]
    return [
        torch.tensor(float(match is not None and int(match[1]) == result))
        for match, result in zip(found, results, strict=True)
    ]


def make_task() -> tuple[str, int]:
    a, b, c = (random.randint(2, 20) for _ in range(3))
    term = random.choice([f"{a}*({b}+{c})", f"{a}-{b}*{c}", f"{a}+{b}-{c}"])
    return f"What is {term}?\n", calculator(term)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return each step's mean reward."""
    args = arguments(argv)
    set_seed(0)
    config = PPOConfig(
        model_name=args.model,
        learning_rate=1e-5,
        batch_size=args.batch_size,
        mini_batch_size=4,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = PPOTrainer(config, model, None, tokenizer)
    environment = TextEnvironment(
        trainer.model,
        tokenizer,
        tools=[calculator],
        reward_fn=exact_match,
        prompt=PROMPT,
        max_turns=2,
        generation_kwargs={"max_new_tokens": 32},
    )
    means: list[float] = []
    for step in range(1, args.steps + 1):
        tasks, results = zip(*(make_task() for _ in range(args.batch_size)), strict=True)
        queries, responses, masks, rewards, histories = environment.run(
            tasks, results=list(results)
        )
        stats = trainer.step(queries, responses, rewards, masks)
        calls = sum(any(history.system_spans[1:]) for history in histories)
        means.append(torch.stack(rewards).mean().item())
        print(f"step {step}: {means[-1]:.0%} right, {calls} calls, KL {stats['objective/kl']:.3f}")
    trainer.save_pretrained(args.output)
    return means


if __name__ == "__main__":
    main()
