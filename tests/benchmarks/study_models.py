"""Small policies of other architectures, trained on the embedded reviews, for `study.py`.

python study_models.py llama|gpt_neox FOLDER [--steps 1500]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from ppo_cli.data.embedded import policy_folder
from ppo_cli.data.embedded.build import batches, chunks, policy_loss, save_tokenizer, train


def architecture(kind: str, vocabulary: int, end: int) -> PretrainedConfig:
    """About a million parameters of each kind, of different shapes."""
    common = {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end}
    common |= {"max_position_embeddings": 128, "initializer_range": 0.05}
    if kind == "llama":
        return LlamaConfig(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **common,
        )
    return GPTNeoXConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        tie_word_embeddings=False,
        **common,
    )


def main() -> None:
    """Train and save one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["llama", "gpt_neox"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(policy_folder())
    end = int(tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture(arguments.kind, len(tokenizer), end))
    rng = random.Random(0)

    def stream() -> Iterator[list[Any]]:
        for chunk in chunks(0):
            encoded = tokenizer([review.text for review in chunk])["input_ids"]
            rows = [([*ids, end][:128],) for ids in encoded]
            for batch in batches(rows, 32, rng):
                yield [row for (row,) in batch]

    train(
        arguments.kind,
        model,
        stream(),
        lambda rows: policy_loss(model, rows, end),
        steps=arguments.steps,
        rate=3e-3,
    )
    model.save_pretrained(arguments.folder)
    save_tokenizer(tokenizer, arguments.folder)


if __name__ == "__main__":
    main()
