"""Small models that the tests make themselves, and the surroundings they run in."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate would else set more, for all that follow
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)
from ppo_cli.kernels.switch import using
from ppo_cli.models.sampling import check_sampling
from ppo_cli.ppo.forward import check_reading
from ppo_cli.reporting.plots import plot_training
from ppo_cli.training import results
from tests.parity.seq2seq import BART, T5, make_model
from tests.parity.seq2seq import VOCABULARY as SEQ2SEQ_VOCABULARY

torch.set_num_threads(1)
# A short run would wait for the disk as long as it computes; `tests/utils/test_files.py` shows what
# is flushed.
os.fsync = lambda _: None
# The picture of a run has one panel, not two: the other is a tenth of a short run. Both are in the
# run that `tests/test_cli.py` starts anew, and in `tests/reporting/test_plots.py`.
results.plot_training = partial(plot_training, metrics=["env/reward_mean"])

SMALL_RUN = str(Path(__file__).parent / "fixtures" / "small.yaml")
"""A configuration of the embedded models: small, and the same whatever the default is tuned to."""

VOCABULARY = 80
EOS = VOCABULARY - 1
# Two small layers, in the names that most architectures have.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.3,
}


def make_tokenizer(
    vocabulary: int = VOCABULARY, pad: int | None = EOS, eos: int = EOS, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the entries t0, t1, ..."""
    words = {f"t{i}": i for i in range(vocabulary)}
    raw = Tokenizer(WordLevel(words, unk_token=f"t{eos}"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=f"t{eos}",
        pad_token=None if pad is None else f"t{pad}",
        padding_side=padding_side,
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens of `make_chat_tokenizer`, the first is its end of text; ids from 256 on."""


def make_chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a chat template; a turn and a text end with two tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    raw = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(CHAT_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=CHAT_TOKENS[0])
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, template: str | None = CHATML, seed: int = 0) -> str:
    """A random two-layer model with that tokenizer, in a folder."""
    tokenizer = make_chat_tokenizer(template)
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    make_gpt2(seed, vocab_size=len(tokenizer), n_positions=192, **ends).save_pretrained(folder)
    return str(folder)


def make_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A random two-layer GPT-2, without dropout unless asked."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_positions": 48,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes})).eval()


def make_seq2seq(kind: str = "T5", seed: int = 0, **changes: Any) -> Any:
    """A random encoder-decoder: T5 or BART, without dropout unless asked."""
    torch.manual_seed(seed)
    settings = {"T5": T5, "Bart": BART}[kind]
    return make_model(kind, {**settings, **changes}).eval()


def make_seq2seq_policy(kind: str = "T5", seed: int = 0) -> AutoModelForSeq2SeqLMWithValueHead:
    """A policy of `make_seq2seq`, without dropout before its value head."""
    model = make_seq2seq(kind, seed)
    return AutoModelForSeq2SeqLMWithValueHead(model, summary_dropout_prob=0.0)


def make_seq2seq_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `make_seq2seq`, which ends a text as T5's does; t0 is padding."""
    tokenizer = make_tokenizer(SEQ2SEQ_VOCABULARY, pad=0, eos=1)
    ending = TemplateProcessing(single="$A t1", special_tokens=[("t1", 1)])
    tokenizer.backend_tokenizer.post_processor = ending
    return tokenizer


def save_seq2seq(folder: Path, kind: str = "T5") -> str:
    """A random encoder-decoder with its tokenizer, in a folder."""
    make_seq2seq(kind).save_pretrained(folder)
    make_seq2seq_tokenizer().save_pretrained(folder)
    return str(folder)


def make_batch(
    size: int = 8, seed: int = 0, longest_query: int = 6, longest_response: int = 8
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Queries, responses and scores at random."""
    g = torch.Generator().manual_seed(seed)

    def ragged(low: int, high: int) -> list[torch.Tensor]:
        return [
            torch.randint(
                0, EOS, (int(torch.randint(low, high + 1, (1,), generator=g)),), generator=g
            )
            for _ in range(size)
        ]

    scores = [torch.randn((), generator=g) for _ in range(size)]
    return ragged(1, longest_query), ragged(1, longest_response), scores


def make_policy(seed: int = 0, **changes: Any) -> AutoModelForCausalLMWithValueHead:
    """A policy of `make_gpt2`, without dropout before its value head."""
    model = make_gpt2(seed, **changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLMWithValueHead(model, summary_dropout_prob=0.0)


def tried(policy: AutoModelForCausalLMWithValueHead) -> AutoModelForCausalLMWithValueHead:
    """`policy` after its self-check: the forwards that follow are those of a test."""
    check_sampling(policy, 0)
    check_reading(policy)
    return policy


def make_silent_policy() -> AutoModelForCausalLMWithValueHead:
    """`make_policy`, but its value head says 0 of everything."""
    policy = make_policy()
    policy.v_head.summary.weight.data.zero_()
    policy.v_head.summary.bias.data.zero_()
    return policy


def make_trainer(
    policy: AutoModelForCausalLMWithValueHead | None = None, reference: Any = None, **settings: Any
) -> PPOTrainer:
    """A trainer of batches of eight; `settings` are the config's, or the constructor's own."""
    extra = {
        key: settings.pop(key)
        for key in ("dataset", "data_collator", "optimizer", "lr_scheduler", "num_shared_layers")
        if key in settings
    }
    tokenizer = settings.pop("tokenizer", None) or make_tokenizer()
    config = PPOConfig(**{"batch_size": 8, "mini_batch_size": 8, "learning_rate": 1e-3, **settings})
    return PPOTrainer(config, policy or make_policy(), reference, tokenizer, **extra)


def weights(policy: torch.nn.Module) -> torch.Tensor:
    """All parameters in a row, copied."""
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def pytest_configure() -> None:
    gc.disable()  # test modules are imported next, which makes objects by the hundred thousand


def pytest_collection_finish() -> None:
    """From here on the collector walks through what tests make, not through modules and tests."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first precision it hears of for the whole process; not here."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def _accelerate_of_this_module() -> None:
    """The precision of another module's tests does not hold for the fixtures of this one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["auto", "off"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """With all fast paths, and with plain torch and transformers."""
    with using(request.param):
        yield


@pytest.fixture
def fast_paths() -> Iterator[None]:
    """All fast paths, whatever the environment says: for a test of what they do."""
    with using("auto"):
        yield


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
