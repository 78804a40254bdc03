"""The sentiment reward, on classifiers that the tests train or damage themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_gpt2, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ppo_cli.errors import ModelError, ModelNotFoundError, UsageError
from ppo_cli.reward import PROBES, SentimentReward, resolve_label

FILLER = [f"w{i}" for i in range(30)]
GOOD, BAD = PROBES["positive"], PROBES["negative"]


def make_word_tokenizer(special: bool = True, **changes: Any) -> PreTrainedTokenizerFast:
    """Lower-case words of the probing sentences and some others; [CLS] and [SEP] around a text."""
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {w for text in (*GOOD, *BAD) for w, _ in splitter.pre_tokenize_str(text.lower())}
    entries = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *sorted(words), *FILLER]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = splitter
    if special:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
        )
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if special:
        tokens |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**tokens, **changes})


def make_classifier(kind: str = "DistilBert", positions: int = 24, **changes: Any) -> Any:
    """A random classifier of two labels; its pad token is 1, as RoBERTa's must be."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": len(make_word_tokenizer()),
        "pad_token_id": 1,
        "id2label": {0: "NEGATIVE", 1: "POSITIVE"},
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
        "initializer_range": 0.4,
    }
    if kind == "DistilBert":
        settings |= {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    elif kind == "GPT2":
        settings |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    elif kind == "XLNet":
        settings |= {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    else:
        settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        settings["intermediate_size"] = 16
    if kind == "Longformer":
        settings |= {"attention_window": [4], "sep_token_id": 2}
    if kind not in ("GPT2", "XLNet"):
        settings["max_position_embeddings"] = positions
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def save(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or make_word_tokenizer()).save_pretrained(folder)
    return str(folder)


def teach(model: Any, targets: Tensor) -> None:
    """Train until the probing sentences, good ones first, get `targets` as logits."""
    batch = make_word_tokenizer()([*GOOD, *BAD], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        loss = (model(**batch).logits - targets).square().mean()
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows good from bad, labels NEGATIVE and POSITIVE."""
    model = make_classifier()
    teach(model, torch.tensor([[-2.0, 2.0]] * 2 + [[2.0, -2.0]] * 2))
    folder = tmp_path_factory.mktemp("classifier")
    save(folder, model)
    return folder


def relabelled(trained: Path, folder: Path, *labels: str) -> str:
    """The trained classifier with other names for its labels: index 0 is bad, index 1 good."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# ---------------------------------------------------------------- labels

TWO = ["NEGATIVE", "POSITIVE"]
STARS = ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
FEELINGS = ["sadness", "joy", "love", "anger"]


@pytest.mark.parametrize(
    ("sentiment", "labels", "index"),
    [
        ("positive", TWO, 1),
        ("NEGATIVE", TWO, 0),
        ("Pos", TWO, 1),
        ("bad", TWO, 0),
        ("1", TWO, 1),
        ("0", TWO, 0),
        ("positive", ["pos", "neg"], 0),
        ("Negative", ["Very Positive", "very_negative"], 1),
        ("LABEL_1", ["LABEL_0", "LABEL_1"], 1),
        ("label_0", ["LABEL_0", "LABEL_1"], 0),
        ("positive", ["LABEL_0", "LABEL_1"], 1),
        ("neg", ["LABEL_0", "LABEL_1"], 0),
        ("5 stars", STARS, 4),
        ("3 Stars", STARS, 2),
        ("positive", STARS, 4),
        ("negative", STARS, 0),
        ("4", STARS, 4),
        ("joy", FEELINGS, 1),
        ("Sadness", FEELINGS, 0),
        ("3", FEELINGS, 3),
        ("positive", ["negative", "neutral", "positive"], 2),
        ("neutral", ["negative", "neutral", "positive"], 1),
        # A label's own name goes before its index and before synonyms.
        ("1", ["1", "0"], 0),
        ("good", ["positive", "good"], 1),
        ("not-good", ["good", "not_good"], 1),
    ],
)
def test_a_sentiment_names_its_label(sentiment: str, labels: list[str], index: int) -> None:
    assert resolve_label(sentiment, labels) == index


@pytest.mark.parametrize(
    ("sentiment", "labels"),
    [
        ("positive", FEELINGS),
        ("positive", ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ("2", TWO),
        ("-1", TWO),
        ("²", TWO),
        ("6 stars", ["1 star"]),
        ("", TWO),
    ],
)
def test_a_sentiment_without_a_label_is_refused_with_those_there_are(
    sentiment: str, labels: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        resolve_label(sentiment, labels)
    assert f"'{sentiment}'" in str(error.value)
    assert ", ".join(labels) in str(error.value)


def test_the_nearest_label_is_suggested() -> None:
    with pytest.raises(UsageError, match="Did you mean 'sadness'"):
        resolve_label("sadnes", FEELINGS)


@pytest.mark.parametrize("sentiment", ["positve", "joyful"])
def test_a_typing_error_in_a_common_word_is_refused_with_the_nearest_label(sentiment: str) -> None:
    labels = TWO if sentiment == "positve" else FEELINGS
    with pytest.raises(UsageError, match=r"Did you mean '(POSITIVE|joy)'"):
        resolve_label(sentiment, labels)


# ---------------------------------------------------------------- scores

TEXTS = [
    "this movie was terrible",
    "w1 w2",
    "",
    "an excellent film with great acting. " * 2,
    "w3",
    "i loved every minute of it w5 w6 w7",
    "w9 W10 unknown",
]


@torch.no_grad()
def logits_one_by_one(model: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Each text alone, without padding, cut by hand: the special tokens stay at its ends."""
    rows = []
    for text in texts:
        ids = tokenizer(text).input_ids
        if len(ids) > length:
            ids = [*ids[: length - 1], ids[-1]]
        rows.append(model(input_ids=torch.tensor([ids])).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_the_labels_logits_in_the_order_of_the_texts(
    tmp_path: Path, batch_size: int
) -> None:
    model = make_classifier()
    reward = SentimentReward(save(tmp_path, model), "positive", batch_size=batch_size)
    expected = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24)
    scores = reward(TEXTS)
    assert reward.label == "POSITIVE"
    assert scores.dtype == torch.float32
    assert scores.shape == (len(TEXTS),)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected[:, 1], rtol=1e-4, atol=1e-5)
    negative = SentimentReward(str(tmp_path), "negative", batch_size=batch_size)(TEXTS)
    torch.testing.assert_close(negative, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_probabilities_are_the_shares_of_the_exponentials(tmp_path: Path) -> None:
    model = make_classifier(num_labels=3, id2label={0: "neg", 1: "neutral", 2: "pos"})
    reward = SentimentReward(save(tmp_path, model), "positive", output="probability")
    powers = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24).double().exp()
    expected = powers[:, 2] / (powers[:, 0] + powers[:, 1] + powers[:, 2])
    torch.testing.assert_close(reward(TEXTS).double(), expected, rtol=1e-4, atol=1e-5)
    logits, probabilities = reward.scores(TEXTS)
    assert torch.equal(probabilities, reward(TEXTS))
    torch.testing.assert_close(logits.double(), powers[:, 2].log(), rtol=1e-4, atol=1e-5)


def test_each_label_of_a_multi_label_classifier_is_logistic(tmp_path: Path) -> None:
    model = make_classifier(
        num_labels=3,
        id2label=dict(enumerate(FEELINGS[:3])),
        problem_type="multi_label_classification",
    )
    reward = SentimentReward(save(tmp_path, model), "joy", output="probability")
    expected = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24)[:, 1].double()
    torch.testing.assert_close(
        reward(TEXTS).double(), 1 / (1 + (-expected).exp()), rtol=1e-4, atol=1e-5
    )


def test_a_classifier_with_one_output_is_logistic_with_its_negative_reversed(
    tmp_path: Path,
) -> None:
    model = make_classifier(num_labels=1, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0})
    folder = save(tmp_path, model)
    out = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24)[:, 0]
    positive = SentimentReward(folder, "positive").scores(TEXTS)
    negative = SentimentReward(folder, "negative").scores(TEXTS)
    torch.testing.assert_close(positive[0], out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(negative[0], -out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positive[1], 1 / (1 + (-out).exp()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positive[1] + negative[1], torch.ones(len(TEXTS)))


@pytest.mark.parametrize("kind", ["DistilBert", "Bert", "GPT2"])
def test_texts_are_cut_to_what_the_classifier_reads(tmp_path: Path, kind: str) -> None:
    tokenizer = make_word_tokenizer(special=kind != "GPT2")
    model = make_classifier(kind, positions=12)
    reward = SentimentReward(save(tmp_path, model, tokenizer))
    long = " ".join(FILLER)
    kept = 12 if kind == "GPT2" else 10
    scores = reward([long, " ".join(FILLER[:kept]), " ".join(FILLER[: kept - 1])])
    assert reward.max_length == 12
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5)
    assert abs(scores[1] - scores[2]) > 1e-4


@pytest.mark.parametrize(
    "kind", ["Roberta", "XLMRoberta", "Camembert", "RobertaPreLayerNorm", "Data2VecText", "MPNet"]
)
def test_architectures_whose_positions_begin_after_the_pad_id_are_cut_in_time(
    tmp_path: Path, kind: str
) -> None:
    """Position 0 and 1 are never used, so 12 rows of them hold 10 tokens."""
    model = make_classifier(kind, positions=12)
    scores = SentimentReward(save(tmp_path, model))([" ".join(FILLER), " ".join(FILLER[:8])])
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5)


def test_a_classifier_without_a_limit_on_positions_reads_long_texts(tmp_path: Path) -> None:
    """XLNet: it scores the last place, so that its tokenizer pads on the left."""
    tokenizer = make_word_tokenizer(padding_side="left")
    model = make_classifier("XLNet")
    texts = [" ".join(FILLER), FILLER[0]]
    scores = SentimentReward(save(tmp_path, model, tokenizer))(texts)
    expected = logits_one_by_one(model, tokenizer, texts, 1000)[:, 1]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_shorter_limit_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    tokenizer = make_word_tokenizer(model_max_length=6)
    reward = SentimentReward(save(tmp_path, make_classifier(), tokenizer))
    scores = reward([" ".join(FILLER), " ".join(FILLER[:4])])
    assert reward.max_length == 6
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5)


@pytest.mark.parametrize("model_pad", [None, 1, 5])
@pytest.mark.parametrize("pad", ["eos", "unk"])
def test_a_decoder_without_a_pad_token_scores_the_last_real_token_of_each_text(
    tmp_path: Path, pad: str, model_pad: int | None
) -> None:
    """The pad token that is made up must not hide the end of a text, or be taken for it."""
    names: dict[str, Any] = {"pad_token": None}
    if pad == "eos":
        names["eos_token"] = "w29"
    tokenizer = make_word_tokenizer(special=False, **names)
    model = make_classifier("GPT2", pad_token_id=model_pad)
    texts = ["w1 w2 w3 w4 w5", "w1", "w7 w8", "this movie"]
    reward = SentimentReward(save(tmp_path, model, tokenizer))
    expected = logits_one_by_one(model, tokenizer, texts, 24)[:, 1]
    torch.testing.assert_close(reward(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["DistilBert", "GPT2"])
def test_a_tokenizer_that_pads_on_the_left_does_not_change_scores(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = make_word_tokenizer(special=kind != "GPT2", padding_side="left")
    model = make_classifier(kind)
    texts = ["w1 w2 w3 w4 w5", "w1", "w7 w8", "this movie"]
    reward = SentimentReward(save(tmp_path, model, tokenizer))
    expected = logits_one_by_one(model, tokenizer, texts, 24)[:, 1]
    torch.testing.assert_close(reward(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["DistilBert", "GPT2"])
def test_an_empty_text_has_the_same_finite_score_alone_and_among_others(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = make_word_tokenizer(special=kind != "GPT2")
    reward = SentimentReward(save(tmp_path, make_classifier(kind), tokenizer))
    alone = reward([""])
    both = reward(["w1 w2 w3", "", "w4"])
    assert alone.isfinite().all()
    assert both[1].item() == pytest.approx(alone.item(), abs=1e-5)
    assert both[0].item() == pytest.approx(reward(["w1 w2 w3"]).item(), abs=1e-5)
    assert reward(["", " "]).isfinite().all()


def test_no_texts_have_no_scores(tmp_path: Path) -> None:
    reward = SentimentReward(save(tmp_path, make_classifier()))
    assert reward([]).shape == (0,)


def test_a_score_that_is_not_finite_is_an_error_that_quotes_the_text(tmp_path: Path) -> None:
    model, tokenizer = make_classifier(), make_word_tokenizer()
    with torch.no_grad():
        row = tokenizer.convert_tokens_to_ids("w7")
        model.distilbert.embeddings.word_embeddings.weight[row] = float("nan")
    reward = SentimentReward(save(tmp_path, model))
    assert reward(["w1", "w2 w3"]).isfinite().all()
    with pytest.raises(ModelError, match=r"not finite to 'w6 w7 w8'"):
        reward(["w1", "w2 w3", "w6 w7 w8", "w4"])


def test_scoring_leaves_no_graph_and_uses_no_dropout(tmp_path: Path) -> None:
    model = make_classifier(seq_classif_dropout=0.5, dropout=0.5, attention_dropout=0.5)
    reward = SentimentReward(save(tmp_path, model))
    assert torch.equal(reward(TEXTS), reward(TEXTS))
    assert not reward.classifier.training


# ---------------------------------------------------------------- probing


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("sentiment", ["positive", "negative"])
def test_a_classifier_that_knows_good_from_bad_passes(
    trained: Path, sentiment: str, output: Any
) -> None:
    reward = SentimentReward(str(trained), sentiment, output=output)
    reward.probe()
    good, bad = reward(GOOD).mean(), reward(BAD).mean()
    assert (good > bad) == (sentiment == "positive")


@pytest.mark.parametrize("sentiment", ["positive", "negative"])
def test_reversed_labels_are_refused_with_what_was_seen(
    trained: Path, tmp_path: Path, sentiment: str
) -> None:
    folder = relabelled(trained, tmp_path, "POSITIVE", "NEGATIVE")
    with pytest.raises(UsageError) as error:
        SentimentReward(folder, sentiment).probe()
    for part in (folder, sentiment.upper(), "reversed", "POSITIVE, NEGATIVE", "reward.probe=false"):
        assert part in str(error.value)
    share = 0.02 if sentiment == "positive" else 0.98
    assert f"{share} on clearly positive" in str(error.value)


@pytest.mark.parametrize("sentiment", ["positive", "negative", "LABEL_0", "1"])
def test_labels_without_a_meaning_are_right_by_custom_or_refused(
    trained: Path, tmp_path: Path, sentiment: str
) -> None:
    right = relabelled(trained, tmp_path / "right", "LABEL_0", "LABEL_1")
    SentimentReward(right, sentiment).probe()
    model = make_classifier(id2label={0: "LABEL_0", 1: "LABEL_1"})
    teach(model, torch.tensor([[2.0, -2.0]] * 2 + [[-2.0, 2.0]] * 2))
    wrong = save(tmp_path / "wrong", model)
    with pytest.raises(UsageError, match="reversed"):
        SentimentReward(wrong, sentiment).probe()


def test_labels_of_another_kind_pass_in_either_direction(trained: Path, tmp_path: Path) -> None:
    folder = relabelled(trained, tmp_path, "sadness", "joy")
    SentimentReward(folder, "joy").probe()
    SentimentReward(folder, "sadness").probe()


@pytest.mark.parametrize("labels", [TWO, ["sadness", "joy"]])
def test_a_classifier_that_says_the_same_to_everything_is_refused(
    trained: Path, tmp_path: Path, labels: list[str]
) -> None:
    folder = relabelled(trained, tmp_path, *labels)
    model = transformers.DistilBertForSequenceClassification.from_pretrained(folder)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match="does not tell sentiment apart"):
        SentimentReward(folder, labels[1]).probe()


# ---------------------------------------------------------------- refusals


def test_models_that_are_no_sequence_classifiers_are_refused_by_name(tmp_path: Path) -> None:
    config = make_classifier("Bert").config
    for name in ("BertForMaskedLM", "BertForTokenClassification", "BertForMultipleChoice"):
        folder = save(tmp_path / name, getattr(transformers, name)(config))
        with pytest.raises(ModelError, match=f"{name}, not a sequence classifier"):
            SentimentReward(folder)
    folder = save(tmp_path / "gpt2", make_gpt2(), make_tokenizer())
    with pytest.raises(ModelError, match="GPT2LMHeadModel, not a sequence classifier"):
        SentimentReward(folder)


def test_what_is_no_classifier_folder_is_not_found_and_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("gone", "empty", "file"):
        with pytest.raises(ModelNotFoundError, match=name):
            SentimentReward(str(tmp_path / name))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_one_message_that_names_the_folder(
    trained: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(trained, tmp_path / "c")
    data = (tmp_path / "c" / file).read_bytes()
    (tmp_path / "c" / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError) as error:
        SentimentReward(str(tmp_path / "c"))
    assert str(tmp_path / "c") in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_label_and_an_unknown_output_are_refused(trained: Path) -> None:
    with pytest.raises(UsageError, match="no label 'angry'; its labels are NEGATIVE, POSITIVE"):
        SentimentReward(str(trained), "angry")
    with pytest.raises(UsageError, match="'logits' is neither 'logit' nor 'probability'"):
        SentimentReward(str(trained), output="logits")  # type: ignore[arg-type]
