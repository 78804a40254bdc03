"""Queries as token ids: how texts are encoded, and that ids are never decoded in between."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ppo_cli.config.schema import PolicyConfig, PromptsConfig, RewardConfig, RunConfig
from ppo_cli.data.embedded.grammar import reviews
from ppo_cli.data.encoder import Encoder
from ppo_cli.data.prompts import load_held_out, load_prompts
from ppo_cli.data.rows import Row
from ppo_cli.evaluation import compare, generate
from ppo_cli.evaluation.generate import Request, Source
from ppo_cli.models.loading import load_tokenizer
from ppo_cli.models.sampling import Rollout, to_texts
from ppo_cli.rewards.partial_scores import potentials
from tests.conftest import make_gpt2, make_tokenizer

PROSE = [review.text for review in reviews(300, 5)]
LONG = "incomprehensibilities"  # a token of the tokenizers below
EMOJI = "👏🏽 the 🎬 is 🤩"


def sentencepiece(before: str = "<s> ", after: str = "", across: bool = False) -> Any:
    """A tokenizer like Llama's: BPE with "▁" for spaces, bytes for unknown characters.

    Args:
        before, after: the special tokens that come with every text.
        across: tokens may hold several words.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    if not across:
        raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    raw.train_from_iterator([*PROSE, f"one {LONG}" * 500], trainer)
    raw.pre_tokenizer = None
    made = json.loads(raw.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # the bytes are no special tokens
    raw = Tokenizer.from_str(json.dumps(made))
    raw.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bytelevel() -> Any:
    """A tokenizer like GPT-2's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*PROSE, f"one {LONG}" * 500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def wordpiece() -> Any:
    """A tokenizer like BERT's."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    raw.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    raw.train_from_iterator([*PROSE, f"one {LONG}" * 500], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


TOKENIZERS = {
    "bytes": bytelevel,
    "pieces": sentencepiece,
    "no beginning": lambda: sentencepiece(before=""),
    "words": wordpiece,
    "python": ByT5Tokenizer,
    "embedded": lambda: load_tokenizer("embedded"),
}


@pytest.mark.parametrize("name", ["bytes", "pieces", "no beginning", "embedded"])
def test_where_nothing_is_appended_the_ids_are_the_tokenizers_own(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    assert Encoder(tokenizer)(PROSE) == tokenizer(PROSE).input_ids


@pytest.mark.parametrize(
    ("tokenizer", "before", "after"),
    [
        (lambda: sentencepiece("<s> ", " </s>"), ["<s>"], ["</s>"]),
        (lambda: sentencepiece("", " </s>"), [], ["</s>"]),
        (wordpiece, ["[CLS]"], ["[SEP]"]),
        (ByT5Tokenizer, [], ["</s>"]),
    ],
)
def test_what_a_tokenizer_appends_is_not_part_of_a_query(
    tokenizer: Any, before: list[str], after: list[str]
) -> None:
    made = tokenizer()
    for ids, whole in zip(Encoder(made)(PROSE[:20]), made(PROSE[:20]).input_ids, strict=True):
        assert made.convert_ids_to_tokens(whole[len(ids) :]) == after
        assert ids == whole[: len(ids)]
        assert made.convert_ids_to_tokens(ids[: len(before)]) == before


@pytest.mark.parametrize("name", ["bytes", "pieces", "python"])
def test_text_that_spells_a_special_token_is_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = f"a film{tokenizer.eos_token} and more {tokenizer.eos_token}"
    ids = Encoder(tokenizer)([text])[0]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_other_added_tokens_stay_tokens_in_python_and_elsewhere() -> None:
    for tokenizer in (bytelevel(), ByT5Tokenizer()):
        tokenizer.add_tokens(["film"])
        assert tokenizer.convert_tokens_to_ids("film") in Encoder(tokenizer)(["a film"])[0]


def texts_of_all_kinds() -> list[str]:
    """Prose, and texts that are hard to cut: no spaces or only spaces, emoji, special tokens."""
    dice = random.Random(0)
    parts = [
        *PROSE[:40],
        "x" * 90,
        "…" * 50,
        " " * 70,
        "\n \n",
        "\t",
        EMOJI,
        "</s>",
        " ▁ ",
        "12345",
    ]
    texts = ["".join(dice.choices(parts, k=12)) for _ in range(60)]
    return [
        *texts,
        "word " * 200,
        f"{LONG} " * 60,
        "word" * 200,
        "a  b  " * 100,
        "\n".join(PROSE[:30]),
    ]


@pytest.mark.parametrize("longest", [1, 2, 7, 40])
@pytest.mark.parametrize("name", [*TOKENIZERS, "across"])
def test_the_first_tokens_are_those_of_the_whole_text(name: str, longest: int) -> None:
    tokenizer = sentencepiece(across=True) if name == "across" else TOKENIZERS[name]()
    encode, texts = Encoder(tokenizer), texts_of_all_kinds()
    whole = [ids[:longest] for ids in encode(texts)]
    assert encode(texts, longest) == whole


@pytest.mark.parametrize(("across", "share"), [(False, 0.2), (True, 1.0)])
def test_the_rest_of_a_text_is_left_unread_where_no_token_reaches_across_words(
    across: bool, share: float
) -> None:
    tokenizer = sentencepiece(across=across)
    assert any("▁" in token[1:].strip("▁") for token in tokenizer.get_vocab()) == across
    read: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            read.extend([texts] if isinstance(texts, str) else texts)
            return tokenizer(texts, **options)

    long = " ".join(PROSE)
    Encoder(Spy())([long] * 3, longest=8)
    assert sum(map(len, read)) <= 3 * len(long) * share + 10
    assert (share < 1) == (sum(map(len, read)) < 3 * len(long))


def split(tokenizer: Any, text: str, at: int) -> tuple[Tensor, Tensor]:
    ids = Encoder(tokenizer)([text])[0]
    return torch.tensor(ids[:at]), torch.tensor(ids[at:])


@pytest.mark.parametrize("text", [*PROSE[:8], EMOJI, "a  b\n c"])
@pytest.mark.parametrize("name", ["bytes", "pieces", "no beginning", "embedded"])
def test_query_and_response_together_are_the_whole_text_wherever_it_is_cut(
    name: str, text: str
) -> None:
    tokenizer = TOKENIZERS[name]()
    length = len(Encoder(tokenizer)([text])[0])
    pairs = [split(tokenizer, text, at) for at in range(1, length)]
    rollout = to_texts(tokenizer, [q for q, _ in pairs], [r for _, r in pairs])
    assert set(rollout.texts) == {text}
    broken = "\N{REPLACEMENT CHARACTER}"
    for (query, _), response in zip(pairs, rollout.response_texts, strict=True):
        shown = tokenizer.decode(query, skip_special_tokens=True).rstrip(broken)
        assert shown + response == text
        assert broken not in response


def test_where_decoding_changes_what_came_before_a_response_is_decoded_alone() -> None:
    tokenizer = wordpiece()
    tokenizer.clean_up_tokenization_spaces = True

    class Joining:
        """Joins a query's last word with what follows."""

        def batch_decode(self, rows: Any, **_: Any) -> list[str]:
            return ["it's" if len(row) == 2 else "it '" for row in rows]

        def decode(self, row: Any, **_: Any) -> str:
            return "s"

    rollout = to_texts(Joining(), [torch.tensor([1])], [torch.tensor([2])])
    assert rollout.response_texts == ["s"]


def test_unfinished_texts_are_beginnings_of_the_finished_one() -> None:
    tokenizer = sentencepiece()
    query, response = split(tokenizer, PROSE[0], 4)
    rollout = to_texts(tokenizer, [query], [response])
    seen: list[str] = []

    def reward(texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return torch.zeros(len(texts))

    potentials(rollout, tokenizer, reward, every=1)
    assert len(seen) == len(response)
    assert all(PROSE[0].startswith(text) for text in seen)
    assert isinstance(rollout, Rollout) and len(seen[0]) < len(seen[-1])


def file_of(tmp_path: Path, texts: Sequence[str]) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["pieces", "words", "bytes"])
def test_a_query_is_shown_without_special_tokens_and_without_broken_characters(
    name: str, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = [f"{EMOJI} {i}" for i in range(30)] if name == "bytes" else PROSE[:30]
    settings = PromptsConfig(source=file_of(tmp_path, texts), held_out=5)
    prompts = load_prompts(settings, tokenizer, seed=1)
    for prompt in prompts.train + prompts.held_out:
        assert not any(token in prompt.query for token in tokenizer.all_special_tokens)
        if prompt.query != "\N{REPLACEMENT CHARACTER}":
            whole = {text.lower() if name == "words" else text for text in texts}
            assert any(text.startswith(prompt.query) for text in whole)


def test_held_out_prompts_alone_are_those_of_all_prompts(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    for settings in (
        PromptsConfig(held_out=12, limit=50),
        PromptsConfig(source=file_of(tmp_path, PROSE), held_out=12, limit=50),
    ):
        expected = load_prompts(settings, tokenizer, seed=3).held_out
        found = load_held_out(settings, tokenizer, seed=3)
        assert [p.input_ids.tolist() for p in found] == [p.input_ids.tolist() for p in expected]


def test_many_texts_are_tokenized_in_batches_and_it_is_told_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ppo_cli.data.prompts.TOKENIZER_BATCH", 7)
    monkeypatch.setattr("ppo_cli.data.prompts.PROGRESS_FROM", 40)
    settings, tokenizer, told = PromptsConfig(limit=40, held_out=5), bytelevel(), list[str]()
    prompts = load_prompts(settings, tokenizer, 0, told.append)
    assert told == [f"{n} of 40 texts tokenized" for n in (14, 21, 35, 40)]
    monkeypatch.undo()
    expected = load_prompts(settings, tokenizer, 0, told.append)
    assert len(told) == 4  # few texts are not worth a word
    for found, whole in ((prompts.train, expected.train), (prompts.held_out, expected.held_out)):
        assert [p.input_ids.tolist() for p in found] == [p.input_ids.tolist() for p in whole]


class Judge:
    """Scores texts by their lengths."""

    label, output = "LONG", "logit"

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        values = torch.tensor([float(len(text)) for text in texts])
        return values, values


def test_compare_asks_the_held_out_prompts_by_the_ids_that_training_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentencepiece()
    for name, seed in (("base", 0), ("tuned", 1)):
        make_gpt2(seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    make_gpt2(2, vocab_size=500).save_pretrained(tmp_path / "other")
    bytelevel().save_pretrained(tmp_path / "other")
    texts = [f"{EMOJI} {text}" for text in PROSE]  # many a query ends within a character
    run = RunConfig(
        policy=PolicyConfig(model=str(tmp_path / "base")),
        prompts=PromptsConfig(source=file_of(tmp_path, texts), held_out=8),
    )
    asked: list[list[list[int]]] = []
    draw = compare.draw_rollout

    def spy(
        model: Any, tokenizer: Any, queries: Sequence[Tensor], *args: Any, **kw: Any
    ) -> Rollout:
        asked.append([query.tolist() for query in queries])
        return draw(model, tokenizer, queries, *args, **kw)

    monkeypatch.setattr(compare, "draw_rollout", spy)
    monkeypatch.setattr(compare, "load_classifier", lambda _: Judge())
    sources = [Source(name, str(tmp_path / name)) for name in ("tuned", "base", "other")]
    request = Request(
        sources, RewardConfig(model="x"), run, torch.device("cpu"), reference=sources[1]
    )
    found = compare.compare(request, [], count=12, max_new_tokens=3, seed=0)
    prompts = load_prompts(run.prompts, load_tokenizer(str(tmp_path / "base")), 0).held_out
    ids = [prompt.input_ids.tolist() for prompt in prompts]
    assert asked[:2] == [[*ids, *ids[:4]]] * 2
    assert [row.query for row in found.rows[:8]] == [prompt.query for prompt in prompts]
    other = bytelevel()
    assert asked[2][:8] == [other(prompt.query).input_ids for prompt in prompts]


def test_generate_begins_with_what_the_tokenizer_puts_before_a_text_and_nothing_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentencepiece("<s> ", " </s>")
    make_gpt2(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = generate.load_model(Source("m", str(tmp_path / "model")), torch.device("cpu"))
    ids = generate.encode(loaded, [Row("This film </s>")], 4)[0].tolist()
    assert ids[0] == 1 and 1 not in ids[1:] and 2 not in ids
    assert tokenizer.decode(ids[1:]) == "This film </s>"


def test_a_tokenizer_is_saved_as_it_was(tmp_path: Path) -> None:
    tokenizer = bytelevel()
    tokenizer.save_pretrained(tmp_path / "before")
    Encoder(tokenizer)(["<|endoftext|>"])
    tokenizer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]


def test_a_vocabulary_without_the_probe_is_encoded_all_the_same() -> None:
    assert Encoder(make_tokenizer())(["t1 t2"]) == [[1, 2]]
