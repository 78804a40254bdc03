"""All families of causal models that transformers has, at tiny size: trained, refused, or wrong?

Each is made with random weights, trained for two steps, read again by transformers and sampled
from. `trained`: KL is 0 at the first step, greedy samples and log-probabilities of a ragged batch
are those of a plain forward of each sequence alone, so are gradients, and the saved folder holds
the trained policy. `refused`: one message that names the reason. `wrong`: anything else.
`not made`: no tiny model of the family could be made here, or it cannot be run by itself.

    python tests/stress/zoo.py [FAMILY ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ppo_cli.config.loading import load_config
from ppo_cli.data.embedded import policy_folder
from ppo_cli.errors import PPOCliError
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.training.build import build_training
from tests.models.test_self_check import assert_right

SECONDS = 300
MOST_PARAMETERS = 30_000_000
VOCABULARY = len(AutoTokenizer.from_pretrained(policy_folder()))
SETTINGS = [
    "policy.precision=fp32", "prompts.held_out=4", "prompts.limit=40", "ppo.batch_size=8",
    "ppo.mini_batch_size=4", "rollout.output_min_length=4", "rollout.output_max_length=9",
    "reward.score_every=null", "run.eval_every=0", "run.steps=2", "run.device=cpu",
    "ppo.lr_scheduler_type=constant", "ppo.learning_rate=1e-3",
]  # fmt: skip

# Value -> names that configurations have for it.
SIZES: dict[Any, str] = {
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok "
    "moe_k type_vocab_size mamba_expand linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads time_step_rank "
    "mamba_dt_rank",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim state_size mamba_d_state "
    "ssm_state_size mamba_chunk_size chunk_size rotary_dim kv_channels query_pre_attn_scalar "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input index_head_dim",
    16: "kv_lora_rank q_lora_rank mamba_d_head mamba_head_dim attention_window_size laurel_rank",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim "
    "attention_hidden_size lru_width moe_intermediate_size shared_expert_intermediate_size",
    64: "intermediate_size ffn_dim n_inner d_inner dff hidden_dim decoder_ffn_dim encoder_ffn_dim "
    "dim_feedforward ffn_hidden_size mamba_d_ssm inner_dim index_topk",
    128: "max_position_embeddings n_positions max_seq_len n_ctx",
    1: "n_shared_experts first_k_dense_replace n_group topk_group n_groups mamba_n_groups "
    "mamba_ngroups n_mamba_heads bos_token_id eos_token_id",
    0: "num_kv_shared_layers",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What some families need, or what shows more of them: windows, chunks, two widths, mixed layers.
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6},
    "starcoder2": {"sliding_window": 6},
    "phi3": {"sliding_window": 6, "pad_token_id": 1},
    **dict.fromkeys(
        ("gemma3_text", "gpt_oss", "cohere2", "olmo3", "exaone4", "ministral"), WINDOWS
    ),
    "modernbert-decoder": {**WINDOWS, "local_attention": 6},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), LINEAR),
    "minimax": {**LINEAR, "block_size": 8},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("axk1", "axk2", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    "llama4_text": {
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 64,
        "moe_layers": [1],
    },
    "gemma3n_text": {
        **WINDOWS,
        "intermediate_size": [64, 64],
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "opt": {"word_embed_proj_dim": 16},
    "electra": {"embedding_size": 16},
    "roformer": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.0625},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {**ZAMBA, "num_key_value_heads": 4, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {**ZAMBA, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8, "mamba_headdim": 8},
    "mamba2": {"head_dim": 16, "expand": 2},
    "falcon": {"alibi": False},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "rwkv": {"rescale_every": 1},
}


def make(family: str, folder: Path) -> None:
    """Write a tiny model of a family, with random weights, and the embedded tokenizer."""
    config_class = CONFIG_MAPPING[family]
    known = set(vars(config_class())) | set(config_class.__annotations__)
    sizes = {name: value for value, names in SIZES.items() for name in names.split()}
    sizes["is_decoder"] = True
    settings = {name: value for name, value in sizes.items() if name in known}
    config = config_class(**{**settings, **OWN.get(family, {})})
    if (getattr(config, "pad_token_id", None) or 0) >= VOCABULARY:
        config.pad_token_id = 0
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that nothing is zero, and no two tokens are alike
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            elif not any(part in name.lower() for part in ("a_log", "dt_bias", "time_", ".d")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy_folder()).save_pretrained(folder)


def train(folder: Path, run: Path) -> None:
    """Two steps of a model, with everything held against what plain transformers say.

    Raises:
        PPOCliError: it is refused.
        AssertionError: something is not what the model says.
    """
    places = [f"policy.model={folder}", f"run.output={run}"]
    training = build_training(load_config("tiny", assignments=[*SETTINGS, *places]))
    first, _ = (report.stats["objective/kl"] for report in training.steps())
    assert abs(first) < 1e-3, f"KL at the first step is {first}"
    training.finish()
    training.directory.unlock()
    policy = training.trainer.accelerator.unwrap_model(training.trainer.model).eval()
    old, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    saved, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(saved) is type(old)
    states = zip(old.state_dict().values(), saved.state_dict().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in states), "nothing moved"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        a, b = (
            m.eval()(input_ids=ids, use_cache=False).logits
            for m in (policy.pretrained_model, saved)
        )
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert_right(AutoModelForCausalLMWithValueHead.from_pretrained(run))


def verdict(family: str, workplace: Path) -> tuple[str, str]:
    """`trained`, `refused`, `wrong` or `not made`, and why."""
    folder = workplace / "model"
    try:
        make(family, folder)
    except Exception as error:
        return "not made", _first_line(error)
    try:
        train(folder, workplace / "run")
    except PPOCliError as error:
        return "refused", str(error).replace(str(folder), family)
    except Exception as error:
        return "wrong", f"{_first_line(error)} ({traceback.format_exc().splitlines()[-3].strip()})"
    return "trained", ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _in_a_child(ask: Callable[[str, Path], tuple[str, str]], family: str) -> tuple[str, str]:
    """What `ask` answers in a process of its own, within `SECONDS`."""
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "answer.json"

        def work() -> None:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            answer.write_text(json.dumps(ask(family, Path(name))))

        process = get_context("fork").Process(target=work)
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            made = (Path(name) / "model" / "config.json").exists()
            return ("wrong" if made else "not made"), f"not done after {SECONDS} s"
        if not answer.exists():
            return "wrong", f"ended with code {process.exitcode}"
        found, why = json.loads(answer.read_text())
        return found, why


def main() -> int:
    """Print a line a family and a table; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("family", nargs="*", help="all where none is named")
    families = parser.parse_args().family or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    for family in families:
        start = time.monotonic()
        found, why = _in_a_child(verdict, family)
        counts[found] += 1
        print(f"{found:8} {family:24} {time.monotonic() - start:4.0f} s  {why[:300]}", flush=True)
    print(
        "  ".join(f"{name}: {counts[name]}" for name in ("trained", "refused", "wrong", "not made"))
    )
    return bool(counts["wrong"])


if __name__ == "__main__":
    sys.exit(main())
