"""Records TRL 0.11.4's `step()` on tiny encoder-decoders, for `tests/ppo/test_parity_seq2seq.py`.

Run it with a Python that has TRL 0.11.4 and a transformers that it works with:

    python -m tests.parity.seq2seq tests/fixtures/parity_seq2seq

A case is three steps on a random model. CASE.json holds the configuration, queries, responses,
scores and what `step()` returned; CASE.safetensors the weights before and after, and the arrays.
TRL leaves the first sampled token of each response out of its masks; see docs/trl.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

VOCABULARY, STEPS, BATCH = 60, 3, 8
T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.3,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "t5": ("T5", T5, {"horizon": 60.0, "target": 3.0}),
    "t5_full_minibatched": (
        "T5",
        T5,
        {
            "kl_penalty": "full", "mini_batch_size": 2, "gradient_accumulation_steps": 2,
            "ppo_epochs": 2,
        },
    ),
    "bart": ("Bart", BART, {"adap_kl_ctrl": False}),
}  # fmt: skip
MODELS = {"T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration"}


def make_model(kind: str, settings: dict[str, Any]) -> Any:
    """A random model."""
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **settings)
    return getattr(transformers, MODELS[kind])(config)


def make_batch(generator: torch.Generator, start: int, eos: int) -> tuple[list[Any], ...]:
    """Queries, responses as `generate` returns them, and scores."""

    def draw(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    queries = [torch.cat([draw(1, 7), torch.tensor([eos])]) for _ in range(BATCH)]
    responses = [torch.cat([torch.tensor([start]), draw(2, 9)]) for _ in range(BATCH)]
    responses[2][-1] = eos
    return queries, responses, [torch.randn((), generator=generator) * 2 for _ in range(BATCH)]


def record(kind: str, settings: dict[str, Any], ppo: dict[str, Any]) -> tuple[Any, Any]:
    """Three steps of TRL: what the two files of a case hold."""
    from trl import (
        AutoModelForSeq2SeqLMWithValueHead,
        PPOConfig,
        PPOTrainer,
        create_reference_model,
    )

    torch.manual_seed(0)
    policy = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        make_model(kind, settings), summary_dropout_prob=0.0
    )
    reference = create_reference_model(policy)
    words = {f"t{i}": i for i in range(VOCABULARY)}
    raw = Tokenizer(WordLevel(words, unk_token="t2"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="t1", pad_token="t0")
    ppo = {"batch_size": BATCH, "mini_batch_size": BATCH, "learning_rate": 1e-3, **ppo}
    before = {f"policy_init/{k}": v.clone() for k, v in policy.state_dict().items()}
    trainer = PPOTrainer(PPOConfig(**ppo), policy, reference, tokenizer)
    generator = torch.Generator().manual_seed(1)
    config, steps, arrays = policy.pretrained_model.config, [], {}
    for number in range(STEPS):
        batch = make_batch(generator, config.decoder_start_token_id, config.eos_token_id)
        before_step = trainer.kl_ctl.value
        stats = trainer.step(*batch)
        scalars = {k: float(v) for k, v in stats.items() if np.ndim(v) == 0 and "time/" not in k}
        for key in ("logprobs", "ref_logprobs", "kl_dist"):
            arrays[f"step{number}/{key}"] = torch.tensor(stats[f"objective/{key}"])
        queries, responses, scores = ([item.tolist() for item in part] for part in batch)
        steps.append(
            {"queries": queries, "responses": responses, "scores": scores, "stats": scalars}
            | {"kl_coef_before": float(before_step), "kl_coef_after": float(trainer.kl_ctl.value)}
        )
    after = {f"policy_final/{k}": v for k, v in policy.state_dict().items()}
    # Of tensors that are one, those of the output layer and the stacks are left out.
    tied = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tensors = {k: v for k, v in (before | after).items() if not k.endswith(tied)} | arrays
    facts = {"kind": kind, "model": settings, "ppo_config": ppo, "steps": steps}
    return facts, {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def main() -> None:
    """Write every case into the folder that the command line names."""
    import trl

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    names = {"trl": trl, "transformers": transformers, "torch": torch, "numpy": np}
    versions = {name: module.__version__ for name, module in names.items()}
    for case, arguments in CASES.items():
        facts, tensors = record(*arguments)
        text = json.dumps({"case": case, "versions": versions, **facts})
        (folder / f"{case}.json").write_text(text + "\n", encoding="utf-8")
        save_file(tensors, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main()
