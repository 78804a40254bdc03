"""Build the embedded models from a seed: ``python -m ppo_cli.data.embedded.build``.

Both models see fresh reviews from the grammar at every step, so neither can memorise its data.
Nothing replaces the models in place until the new ones have met every bound.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from ppo_cli.data.embedded import grammar

EOS = "<|endoftext|>"
POSITIONS = 128
SIZE_LIMIT = 3_600_000
LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
PROBES: tuple[tuple[str, int], ...] = (
    ("This movie was wonderful, I loved every minute of it.", 1),
    ("This movie was terrible, a complete waste of time.", 0),
    ("I loved it.", 1),
    ("I hated it.", 0),
    ("What a great film!", 1),
    ("What an awful film!", 0),
    ("The acting is superb and the story is moving.", 1),
    ("The acting is wooden and the story is boring.", 0),
    ("There is not a dull moment in this thriller.", 1),
    ("I did not enjoy this comedy at all.", 0),
    ("It is never boring.", 1),
    ("It is not funny.", 0),
    ("It is hardly worth the ticket.", 0),
    ("This film was not bad at all.", 1),
    ("Gorgeous to look at but painfully slow.", 0),
    ("A little slow, but I loved it.", 1),
    ("Although the cast is excellent, the film is a mess.", 0),
    ("Although the plot is thin, the film is a delight.", 1),
    ("Highly recommended, go and see it.", 1),
    ("Save your money and stay away.", 0),
)


def log(message: str) -> None:
    """Print a plain line at once, so that a slow build shows where it is."""
    print(message, flush=True)


def chunks(seed: int, size: int = 4096) -> Iterator[list[grammar.Review]]:
    """Endless fresh reviews; every chunk has a seed of its own."""
    number = 0
    while True:
        yield grammar.reviews(size, seed * 1_000_003 + 100_000 + number)
        number += 1


def policy_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2: any text has tokens, and there is no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=EOS,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def classifier_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece in the manner of BERT, unlike the policy's in every respect."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    # The library's own trainer breaks ties at random, so the vocabulary is put together here:
    # characters, whole words, and the commonest beginnings and ends of words for unknown ones.
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += [f"##{letter}" for letter in letters if letter.isalnum()]
    parts: Counter[str] = Counter()
    for word in words:
        for length in range(2, min(5, len(word))):
            parts.update((word[:length], f"##{word[-length:]}"))
    for counter in (words, parts):
        pieces += sorted(counter, key=lambda piece: (-counter[piece], piece))
    vocabulary = {piece: index for index, piece in enumerate(list(dict.fromkeys(pieces))[:size])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=True,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Right-pad token rows into one tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def batches(rows: list[Any], size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Batches of rows of like length, in random order, which saves most of the padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    cut = [rows[start : start + size] for start in range(0, len(rows), size)]
    rng.shuffle(cut)
    yield from cut


def train(
    name: str,
    model: torch.nn.Module,
    stream: Iterator[list[Any]],
    loss_of: Callable[[list[Any]], torch.Tensor],
    *,
    steps: int,
    rate: float,
) -> None:
    """A plain AdamW loop with a warm-up and a cosine decay."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warmup = min(100, steps // 10 + 1)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    started, total = time.perf_counter(), 0.0
    every = max(1, steps // 12)
    for step in range(1, steps + 1):
        loss = loss_of(next(stream))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % every == 0 or step == steps:
            seconds = time.perf_counter() - started
            count = every if step % every == 0 else step % every
            log(f"{name}: step {step}/{steps}, loss {total / count:.4f}, {seconds:.0f} s")
            total = 0.0
    model.eval()


def policy_loss(model: GPT2LMHeadModel, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Next-token loss over the rows; the padding at the right is masked out of the targets."""
    ids = padded(rows, pad)
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    logits = model(input_ids=ids).logits[:, :-1]
    targets = ids.masked_fill(~inside, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_policy(seed: int, steps: int, folder: Path) -> None:
    """Train the base model on whole reviews, each closed by the end-of-text token."""
    texts = [review.text for review in grammar.reviews(20_000, seed * 1_000_003)]
    tokenizer = policy_tokenizer(texts, 1408)
    end = int(tokenizer.eos_token_id)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=96,
        n_layer=4,
        n_head=4,
        initializer_range=0.06,  # GPT-2's 0.02 is meant for 768 wide; this learns far sooner
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    rng = random.Random(seed)

    def stream() -> Iterator[list[Any]]:
        for chunk in chunks(seed):
            encoded = tokenizer([review.text for review in chunk])["input_ids"]
            # Some reviews start from the end-of-text token, so that an empty prompt works too.
            starts = [[end] if rng.random() < 0.15 else [] for _ in encoded]
            rows = [
                [*start, *ids, end][:POSITIONS] for start, ids in zip(starts, encoded, strict=True)
            ]
            for batch in batches([(row,) for row in rows], 32, rng):
                yield [row for (row,) in batch]

    log(f"policy: {len(tokenizer)} tokens, {model.num_parameters()} parameters")

    def loss_of(rows: list[Any]) -> torch.Tensor:
        return policy_loss(model, rows, end)

    train("policy", model, stream(), loss_of, steps=steps, rate=5e-3)
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def fragment(text: str, rng: random.Random) -> str:
    """The text whole, or a piece of it such as an unfinished response would leave."""
    roll = rng.random()
    if roll < 0.4:
        return text
    start = 0
    if roll > 0.75:
        words = [0] + [place + 1 for place, letter in enumerate(text) if letter == " "]
        start = rng.choice(words[:-1])
    return text[start : start + rng.randint(3, max(4, len(text) - start))]


def build_classifier(seed: int, steps: int, folder: Path) -> None:
    """Train the classifier on reviews and pieces of them, each with the whole review's label."""
    texts = [review.text for review in grammar.reviews(20_000, seed * 1_000_003 + 1)]
    tokenizer = classifier_tokenizer(texts, 1500)
    pad = int(tokenizer.pad_token_id)
    torch.manual_seed(seed + 1)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        dim=64,
        hidden_dim=256,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        pad_token_id=pad,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = DistilBertForSequenceClassification(config)
    rng = random.Random(seed + 1)

    def stream() -> Iterator[list[Any]]:
        for chunk in chunks(seed + 500):
            pieces = [fragment(review.text, rng) for review in chunk]
            encoded = tokenizer(pieces, truncation=True)["input_ids"]
            rows = list(zip(encoded, (review.label for review in chunk), strict=True))
            yield from batches(rows, 128, rng)

    def loss_of(rows: list[Any]) -> torch.Tensor:
        ids = padded([row for row, _ in rows], pad)
        logits = model(input_ids=ids, attention_mask=(ids != pad).long()).logits
        targets = torch.tensor([label for _, label in rows])
        return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.02)

    log(f"classifier: {len(tokenizer)} tokens, {model.num_parameters()} parameters")
    train("classifier", model, stream(), loss_of, steps=steps, rate=2e-3)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


@torch.no_grad()
def logits_of(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """The classifier's raw logits for the texts, one row of two each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(texts), 250):
        piece = list(texts[start : start + 250])
        batch = tokenizer(piece, padding=True, truncation=True, return_tensors="pt")
        parts.append(model(**batch).logits)
    return torch.cat(parts)


@torch.no_grad()
def samples_of(folder: Path, count: int, seed: int, new_tokens: int = 40) -> list[str]:
    """Plain samples of the base model, each from the first 2 to 7 tokens of a review."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    texts: list[str] = []
    for start in range(0, count, 100):
        chosen = grammar.reviews(min(100, count - start), seed + start)
        rows = [tokenizer(review.text)["input_ids"][: rng.randint(2, 7)] for review in chosen]
        batch = tokenizer.pad([{"input_ids": row} for row in rows], return_tensors="pt")
        output = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens
        )
        texts += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return texts


@torch.no_grad()
def validation_loss(folder: Path, reviews: Sequence[grammar.Review]) -> float:
    """The base model's mean loss per token on reviews that it has not seen."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    end = tokenizer.eos_token_id
    total, tokens = 0.0, 0
    for start in range(0, len(reviews), 100):
        rows = [
            tokenizer(review.text)["input_ids"] + [end] for review in reviews[start : start + 100]
        ]
        count = sum(len(row) - 1 for row in rows)
        total += float(policy_loss(model, rows, end)) * count
        tokens += count
    return total / tokens


def measure(folder: Path, seed: int) -> dict[str, Any]:
    """Everything the bounds are about, measured on the saved models."""
    policy, classifier = folder / "policy", folder / "classifier"
    held_out = grammar.reviews(3000, seed * 1_000_003 + 50_000)
    logits = logits_of(classifier, [review.text for review in held_out])
    right = [int(guess) == r.label for guess, r in zip(logits.argmax(-1), held_out, strict=True)]
    accuracy = {"all": sum(right) / len(right)}
    for kind in grammar.KINDS:
        some = [ok for ok, review in zip(right, held_out, strict=True) if review.kind == kind]
        accuracy[kind] = sum(some) / len(some)
    samples = samples_of(policy, 500, seed * 1_000_003 + 60_000)
    scores = logits_of(classifier, samples)
    openings = [" ".join(review.text.split()[:6]) for review in held_out]
    open_share = (logits_of(classifier, openings).softmax(-1)[:, 1] - 0.5).abs() < 0.3
    guesses = logits_of(classifier, [text for text, _ in PROBES]).argmax(-1).tolist()
    wrong = [text for (text, label), guess in zip(PROBES, guesses, strict=True) if guess != label]
    return {
        "seed": seed,
        "policy_validation_loss": round(validation_loss(policy, held_out[:2000]), 4),
        "samples_mean_positive": round(float(scores.softmax(-1)[:, 1].mean()), 4),
        "samples_positive_logit_mean": round(float(scores[:, 1].mean()), 4),
        "samples_positive_logit_std": round(float(scores[:, 1].std()), 4),
        "samples_positive_logit_largest": round(float(scores[:, 1].abs().max()), 4),
        "samples_duplicates_of_200": 200 - len(set(samples[:200])),
        "openings_left_open": round(float(open_share.float().mean()), 4),
        "classifier_accuracy": {key: round(value, 4) for key, value in accuracy.items()},
        "probe_accuracy": round(1 - len(wrong) / len(PROBES), 4),
        "probes_wrong": wrong,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def failures(figures: dict[str, Any]) -> list[str]:
    """The bounds that the figures miss."""
    missed = []
    if not 0.4 <= figures["samples_mean_positive"] <= 0.6:
        missed.append("mean P(positive) of the base model's samples is not within 0.4 to 0.6")
    if figures["samples_duplicates_of_200"]:
        missed.append("the base model repeats itself among 200 samples")
    missed += [
        f"classifier accuracy on {key} reviews is {value}, below 0.95"
        for key, value in figures["classifier_accuracy"].items()
        if value < 0.95
    ]
    if any(text in figures["probes_wrong"] for text, _ in PROBES[:2]):
        missed.append("a plain probe sentence is scored wrong")
    if figures["probe_accuracy"] < 0.9:
        missed.append(f"probe accuracy is {figures['probe_accuracy']}, below 0.9")
    if figures["bytes"] > SIZE_LIMIT:
        missed.append(f"{figures['bytes']} bytes exceed the limit of {SIZE_LIMIT}")
    return missed


def build(seed: int, output: Path, policy_steps: int, classifier_steps: int) -> int:
    """Build both models in a scratch folder, measure them, and put them in place if they pass."""
    started = time.perf_counter()
    disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        build_classifier(seed, classifier_steps, scratch / "classifier")
        build_policy(seed, policy_steps, scratch / "policy")
        figures = measure(scratch, seed)
        log(json.dumps(figures, indent=2))
        log(f"built in {time.perf_counter() - started:.0f} s")
        missed = failures(figures)
        for line in missed:
            log(f"FAILED: {line}")
        if missed:
            return 1
        output.mkdir(parents=True, exist_ok=True)
        for part in ("policy", "classifier"):
            shutil.rmtree(output / part, ignore_errors=True)
            shutil.copytree(scratch / part, output / part, copy_function=shutil.copyfile)
        (output / "BUILD.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    log(f"written to {output}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the build."""
    parser = argparse.ArgumentParser(
        prog="python -m ppo_cli.data.embedded.build", description=__doc__
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of everything (default 1)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--policy-steps", type=int, default=6000)
    parser.add_argument("--classifier-steps", type=int, default=4500)
    options = parser.parse_args(arguments)
    return build(options.seed, options.output, options.policy_steps, options.classifier_steps)


if __name__ == "__main__":
    sys.exit(main())
