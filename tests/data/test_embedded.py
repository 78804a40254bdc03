"""Embedded data and models: properties of the grammar, quality of the committed models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_cli.data import embedded
from ppo_cli.data.embedded import build, grammar

FRESH_SEED = 987_654
FOLDER = Path(embedded.__file__).parent
LOADED = re.compile(
    r"\b(wonderful|great|excellent|superb|terrific|fantastic|brilliant|delightful|loved|enjoyed|adored"
    r"|terrible|awful|dreadful|horrible|boring|dull|hated|disliked|detested|waste|bored|annoying"
    r"|funny|clever|bad|good|poor|weak|lovely|beautiful|amazing|perfect)\b",
    re.IGNORECASE,
)


def _artefacts() -> list[Path]:
    folders = (embedded.policy_folder(), embedded.classifier_folder())
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_grammar_is_deterministic() -> None:
    assert grammar.reviews(300, 5) == grammar.reviews(300, 5)
    assert grammar.reviews(300, 5)[:100] == grammar.reviews(100, 5)
    assert grammar.reviews(300, 5) != grammar.reviews(300, 6)


def test_grammar_is_balanced_and_tagged() -> None:
    written = grammar.reviews(4000, 7)
    assert 0.47 < sum(review.label for review in written) / 4000 < 0.53
    for kind in grammar.KINDS:
        labels = [review.label for review in written if review.kind == kind]
        assert len(labels) > 600
        assert 0.42 < sum(labels) / len(labels) < 0.58


def test_grammar_is_varied() -> None:
    written = grammar.reviews(2000, 8)
    assert len({review.text for review in written}) >= 1980
    words = {word for review in written for word in re.findall(r"[a-z]+", review.text.lower())}
    assert 800 <= len(words) <= 1500
    assert words >= {"wonderful", "great", "excellent", "loved"}
    assert words >= {"terrible", "awful", "boring", "hated", "waste"}


def test_grammar_is_well_formed() -> None:
    for review in grammar.reviews(5000, 9):
        text = review.text
        assert 8 <= len(text.split()) <= 75, text
        assert text[0].isupper() and text[-1] in ".!", text
        assert not re.search(r"[{}|~*]|\s{2}|\s[.,!]|[.,!]{2}|^\s|\s$", text), text
        assert not re.search(r"[.!] [a-z]", text), text
        assert not re.search(r"\b[Aa] (?!one\b|uni|use)[aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"\b[Aa]n (?!hour)[^aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"(?<!-)\b(\w+) \1\b", text), text


def test_openings_are_neutral() -> None:
    written = grammar.reviews(4000, 10)
    started = [" ".join(review.text.split()[:6]) for review in written]
    loaded = sum(bool(LOADED.search(text)) for text in started)
    assert loaded / len(started) < 0.15
    assert sum(text.startswith(("This movie", "This film")) for text in started) > 300
    for opening in ("I watched", "The acting", "My friends and I"):
        assert any(text.startswith(opening) for text in started)


def test_sentiment_follows_soon() -> None:
    written = grammar.reviews(2000, 11)
    texts = [" ".join(review.text.split()[:22]) for review in written]
    guesses = build.logits_of(embedded.classifier_folder(), texts).argmax(-1).tolist()
    right = [guess == review.label for guess, review in zip(guesses, written, strict=True)]
    assert sum(right) / len(right) > 0.9


def test_importing_is_cheap() -> None:
    code = (
        "import sys; import ppo_cli.data.embedded, ppo_cli.data.embedded.grammar; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert embedded.TRAIN_SEED != embedded.HELD_OUT_SEED


def test_artefacts_are_small_and_safe() -> None:
    files = _artefacts()
    report = FOLDER / "BUILD.json"
    assert sum(path.stat().st_size for path in [*files, report]) <= build.SIZE_LIMIT
    assert all(path.suffix in (".json", ".safetensors", ".txt") for path in files), files
    for folder in (embedded.policy_folder(), embedded.classifier_folder()):
        assert (folder / "model.safetensors").is_file()
        assert (folder / "config.json").is_file()
        assert (folder / "tokenizer.json").is_file()
    assert build.failures(json.loads(report.read_text(encoding="utf-8"))) == []


def test_tokenizers_differ() -> None:
    text = "This movie was shot in Iceland, and I didn't enjoy it."
    policy = AutoTokenizer.from_pretrained(embedded.policy_folder())
    classifier = AutoTokenizer.from_pretrained(embedded.classifier_folder())
    assert policy.is_fast and classifier.is_fast
    assert policy.get_vocab() != classifier.get_vocab()
    assert policy(text)["input_ids"] != classifier(text)["input_ids"]
    assert policy.decode(policy(text)["input_ids"]) == text
    odd = "Zürich, 1999: 🎬!"
    assert policy.decode(policy(odd)["input_ids"]) == odd
    assert policy.eos_token == policy.bos_token == policy.unk_token == build.EOS
    assert policy.pad_token is None
    ids = classifier(text.upper())["input_ids"]
    assert ids == classifier(text)["input_ids"]
    assert ids[0] == classifier.cls_token_id and ids[-1] == classifier.sep_token_id


def test_base_model_samples() -> None:
    samples = build.samples_of(embedded.policy_folder(), 200, FRESH_SEED)
    assert len(set(samples)) == 200
    logits = build.logits_of(embedded.classifier_folder(), samples)
    assert 0.4 <= float(logits.softmax(-1)[:, 1].mean()) <= 0.6
    assert 0.3 < float(logits[:, 1].std()) < 6
    assert float((logits.abs() < 6).float().mean()) > 0.95


def test_base_model_ends_its_reviews() -> None:
    folder = embedded.policy_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(3)
    query = tokenizer(["This movie"] * 40, return_tensors="pt")
    output = model.generate(**query, do_sample=True, top_k=0, max_new_tokens=100)
    ended = (output == tokenizer.eos_token_id).any(-1).float().mean()
    assert float(ended) > 0.9


def test_classifier_is_right_on_held_out_reviews() -> None:
    written = grammar.reviews(2000, FRESH_SEED)
    guesses = build.logits_of(embedded.classifier_folder(), [r.text for r in written]).argmax(-1)
    right = [int(guess) == r.label for guess, r in zip(guesses, written, strict=True)]
    assert sum(right[:1000]) / 1000 >= 0.95
    for kind in grammar.KINDS:
        some = [ok for ok, review in zip(right, written, strict=True) if review.kind == kind]
        assert sum(some) / len(some) >= 0.95, kind


def test_classifier_is_unsure_about_openings() -> None:
    openings = ["This movie", "I watched this thriller", "The acting in this", "My friends and I"]
    positive = build.logits_of(embedded.classifier_folder(), openings).softmax(-1)[:, 1]
    assert all(0.3 < float(value) < 0.7 for value in positive), positive


@pytest.mark.parametrize(("text", "label"), build.PROBES)
def test_probe_sentences(text: str, label: int) -> None:
    logits = build.logits_of(embedded.classifier_folder(), [text])
    assert int(logits.argmax(-1)) == label
