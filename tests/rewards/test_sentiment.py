"""The sentiment reward, on classifiers that the tests train or damage."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ppo_cli.errors import ModelError, ModelNotFoundError, UsageError
from ppo_cli.models.sampling import to_texts
from ppo_cli.rewards.partial_scores import potentials
from ppo_cli.rewards.sentiment import PROBES, SentimentReward, resolve_label
from tests.conftest import make_gpt2, make_tokenizer

FILLER = [f"w{i}" for i in range(30)]
GOOD, BAD = PROBES["positive"], PROBES["negative"]


def make_word_tokenizer(special: bool = True, **changes: Any) -> PreTrainedTokenizerFast:
    """Lower-case words of the probe sentences and some others; [CLS] and [SEP] around a text."""
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
    """Train until the logits of the probe sentences, positive ones first, are `targets`."""
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
    """A trained classifier with the labels NEGATIVE and POSITIVE."""
    model = make_classifier()
    teach(model, torch.tensor([[-2.0, 2.0]] * 2 + [[2.0, -2.0]] * 2))
    folder = tmp_path_factory.mktemp("classifier")
    save(folder, model)
    return folder


def relabelled(trained: Path, folder: Path, *labels: str) -> str:
    """The trained classifier with other label names: index 0 is negative, index 1 positive."""
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
    """Scores of each text alone, without padding, cut to its end; [CLS], if any, stays in front."""
    rows = []
    for text in texts:
        ids = tokenizer(text).input_ids
        if len(ids) > length:
            first = ids[:1] if ids[0] == tokenizer.cls_token_id else []
            ids = [*first, *ids[len(ids) - length + len(first) :]]
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


def one_output(name: str, **changes: Any) -> Any:
    return make_classifier(num_labels=1, id2label={0: name}, label2id={name: 0}, **changes)


@pytest.mark.parametrize(
    ("name", "sentiments"),
    [
        ("LABEL_0", ["LABEL_0", "label 0", "0", "positive", "good"]),
        ("score", ["score", "0", "positive"]),
        ("toxicity", ["toxicity", "0", "positive"]),
        ("Positive", ["positive", "good"]),
        ("negative", ["negative", "bad", "0"]),
    ],
)
@pytest.mark.parametrize("problem", [None, "regression"])
def test_a_single_output_is_scored_as_it_is_under_its_own_name(
    tmp_path: Path, name: str, sentiments: list[str], problem: str | None
) -> None:
    model = one_output(name, problem_type=problem)
    folder = save(tmp_path, model)
    out = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24)[:, 0]
    for sentiment in sentiments:
        reward = SentimentReward(folder, sentiment)
        assert reward.label == name
        logits, probabilities = reward.scores(TEXTS)
        torch.testing.assert_close(logits, out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probabilities, 1 / (1 + (-out).exp()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sentiment"),
    [("LABEL_0", "negative"), ("score", "bad"), ("negative", "positive"), ("score", "toxicity")],
)
def test_a_single_output_is_never_turned_round(tmp_path: Path, name: str, sentiment: str) -> None:
    with pytest.raises(UsageError, match=f"no label '{sentiment}'.*{name}"):
        SentimentReward(save(tmp_path, one_output(name)), sentiment)


@pytest.mark.parametrize(
    ("ids", "outputs", "expected"),
    [
        ({"0": "bad", "1": "good"}, 2, ["bad", "good"]),
        ({"1": "bad", "0": "good"}, 2, ["good", "bad"]),  # in whatever order they stand
        ({"1": "bad", "2": "good"}, 2, ["bad", "good"]),
        ({"1": "bad", "2": "good"}, 3, ["LABEL_0", "bad", "good"]),
        ({"0": "bad", "2": "good"}, 3, ["bad", "LABEL_1", "good"]),
        ({"0": "bad", "4": "good"}, 5, ["bad", "LABEL_1", "LABEL_2", "LABEL_3", "good"]),
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_a_label_has_the_index_of_its_logit_however_the_labels_are_numbered(
    tmp_path: Path, ids: dict[str, str], outputs: int, expected: list[str], counted: bool
) -> None:
    model = make_classifier(num_labels=outputs, id2label=None, label2id=None)
    folder = save(tmp_path, model)
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"id2label": ids} | ({"num_labels": outputs} if counted else {})
    written.pop("label2id", None)
    (tmp_path / "config.json").write_text(json.dumps(written))
    out = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24)
    for name in ids.values():
        reward = SentimentReward(folder, name)
        assert reward.labels == expected
        wanted = out[:, expected.index(name)]
        torch.testing.assert_close(reward(TEXTS), wanted, rtol=1e-4, atol=1e-5)


def test_labels_that_no_output_can_have_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, make_classifier())
    written = json.loads((tmp_path / "config.json").read_text())
    written["id2label"] = {"3": "bad", "7": "good"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match=r"id2label"):
        SentimentReward(folder, "good")


def test_one_name_for_two_labels_is_refused_but_their_indices_are_not() -> None:
    with pytest.raises(UsageError, match=r"2 labels named 'joy'.*index, 0 to 2"):
        resolve_label("joy", ["joy", "anger", "Joy"])
    assert resolve_label("2", ["joy", "anger", "Joy"]) == 2


# ---------------------------------------------------------------- long texts


@pytest.mark.parametrize("kind", ["DistilBert", "Bert", "GPT2"])
def test_of_a_long_text_the_end_is_scored_and_it_is_said_once(tmp_path: Path, kind: str) -> None:
    tokenizer = make_word_tokenizer(special=kind != "GPT2")
    model = make_classifier(kind, positions=12)
    reward = SentimentReward(save(tmp_path, model, tokenizer))
    long = " ".join(FILLER)
    kept = 12 if kind == "GPT2" else 10
    texts = [long, " ".join(FILLER[-kept:]), " ".join(FILLER[-kept + 1 :]), f"{long} w1"]
    with pytest.warns(UserWarning, match=f"2 of 4 texts are longer than the 12 tokens.*{tmp_path}"):
        scores = reward(texts)
    assert reward.max_length == 12
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5)
    assert abs(scores[1] - scores[2]) > 1e-4
    assert abs(scores[0] - scores[3]) > 1e-4
    expected = logits_one_by_one(model, tokenizer, texts, 12)[:, 1]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reward(texts), scores)


def test_a_long_prompt_leaves_room_for_every_part_of_its_response(tmp_path: Path) -> None:
    """Potentials are scores of the text's end, too."""
    policy = make_tokenizer()
    model = make_classifier("GPT2", positions=8, vocab_size=len(policy))
    policy.pad_token = None
    reward = SentimentReward(save(tmp_path, model, policy))
    query, response = torch.arange(20), torch.tensor([30, 31, 32, 33])
    rollout = to_texts(policy, [query], [response])
    with pytest.warns(UserWarning, match="4 of 4 texts"):
        promised = potentials(rollout, policy, reward, every=1)[0]
    whole = [*query.tolist(), *response.tolist()]
    with torch.no_grad():
        rows = [torch.tensor([whole[end - 8 : end]]) for end in range(20, 24)]
        expected = torch.stack([model(input_ids=row).logits[0, 1] for row in rows])
    torch.testing.assert_close(promised, expected, rtol=1e-4, atol=1e-5)
    assert len(set(promised.tolist())) == 4


@pytest.mark.parametrize(
    "kind", ["Roberta", "XLMRoberta", "Camembert", "RobertaPreLayerNorm", "Data2VecText", "MPNet"]
)
def test_architectures_whose_positions_begin_after_the_pad_id_are_cut_in_time(
    tmp_path: Path, kind: str
) -> None:
    """Position 0 and 1 are never used, so 12 rows of them hold 10 tokens."""
    model = make_classifier(kind, positions=12)
    reward = SentimentReward(save(tmp_path, model))
    with pytest.warns(UserWarning, match="longer than the 10 tokens"):
        scores = reward([" ".join(FILLER), " ".join(FILLER[-8:])])
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5)


def test_a_classifier_without_a_limit_on_positions_reads_long_texts(tmp_path: Path) -> None:
    """XLNet scores the last position, so its tokenizer pads on the left."""
    tokenizer = make_word_tokenizer(padding_side="left")
    model = make_classifier("XLNet")
    texts = [" ".join(FILLER), FILLER[0]]
    scores = SentimentReward(save(tmp_path, model, tokenizer))(texts)
    expected = logits_one_by_one(model, tokenizer, texts, 1000)[:, 1]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_shorter_limit_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    tokenizer = make_word_tokenizer(model_max_length=6)
    reward = SentimentReward(save(tmp_path, make_classifier(), tokenizer))
    with pytest.warns(UserWarning, match="longer than the 6 tokens"):
        scores = reward([" ".join(FILLER), " ".join(FILLER[-4:])])
    assert reward.max_length == 6
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5)


@pytest.mark.parametrize("model_pad", [None, 1, 5])
@pytest.mark.parametrize("pad", ["eos", "unk"])
def test_a_decoder_without_a_pad_token_scores_the_last_real_token_of_each_text(
    tmp_path: Path, pad: str, model_pad: int | None
) -> None:
    """The chosen padding token must not occur as the last token of a text."""
    names: dict[str, Any] = {"pad_token": None}
    if pad == "eos":
        names["eos_token"] = "w29"
    tokenizer = make_word_tokenizer(special=False, **names)
    model = make_classifier("GPT2", pad_token_id=model_pad)
    texts = ["w1 w2 w3 w4 w5", "w1", "w7 w8", "this movie"]
    reward = SentimentReward(save(tmp_path, model, tokenizer))
    expected = logits_one_by_one(model, tokenizer, texts, 24)[:, 1]
    torch.testing.assert_close(reward(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config_pad"),
    [
        *[("GPT2", pad) for pad in (None, 1, 5, -1, 10**6)],
        *[(kind, pad) for kind in ("DistilBert", "Roberta") for pad in (1, 5)],
    ],
)
def test_padding_needs_no_pad_token_of_the_tokenizer(
    tmp_path: Path, kind: str, config_pad: int | None
) -> None:
    """The id of the configuration is used, or any: the scores are those of each text alone."""
    tokenizer = make_word_tokenizer(special=kind != "GPT2", pad_token=None, unk_token=None)
    model = make_classifier(kind, pad_token_id=1 if config_pad is None else config_pad)
    model.config.pad_token_id = config_pad
    texts = ["w1 w2 w3 w4 w5", "w1", "w7 w8", "this movie", " ".join(FILLER[:9]), "movie w0"]
    # Texts that end with the tokens that padding may be taken for.
    texts += [f"w1 w2 {word}" for word in tokenizer.convert_ids_to_tokens([3, 4, 5])]
    reward = SentimentReward(save(tmp_path, model, tokenizer))
    expected = logits_one_by_one(model, tokenizer, texts, 24)[:, 1]
    torch.testing.assert_close(reward(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        "ConvBert",
        "FNet",
        "Nystromformer",
        "Canine",
        "XLNet",
        "MobileBert",
        "Albert",
        "GPT2",
        "Roberta",
    ],
)
def test_no_score_depends_on_what_else_is_scored(tmp_path: Path, kind: str) -> None:
    """Padding affects convolutions, Fourier transforms, landmarks; others read the last token."""
    changes: dict[str, Any] = {}
    if kind == "Nystromformer":
        changes = {"num_landmarks": 24, "segment_means_seq_len": 24}
    if kind == "MobileBert":
        changes = {"embedding_size": 16, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    if kind == "Albert":
        changes = {"embedding_size": 16}
    if kind == "Canine":
        changes = {"num_hash_buckets": 32, "num_hash_functions": 2, "local_transformer_stride": 8}
        changes |= {"downsampling_rate": 2, "upsampling_kernel_size": 2}
    if kind == "FNet":
        changes = {"type_vocab_size": 4}
    model, tokenizer = make_classifier(kind, **changes), make_word_tokenizer(special=kind != "GPT2")
    texts = [
        *filter(None, TEXTS),
        " ".join(FILLER[:18]),
        "w5 w6",
        "this movie was wonderful",
        "w8 w9",
    ]
    expected = logits_one_by_one(model, tokenizer, texts, 24)[:, 1]
    folder = save(tmp_path, model, tokenizer)
    for size in (3, 64):
        reward = SentimentReward(folder, batch_size=size)
        for order in (list(range(len(texts))), [7, 2, 9, 1], [3]):
            scores = reward([texts[i] for i in order])
            torch.testing.assert_close(scores, expected[order], rtol=1e-3, atol=1e-4)


def test_a_classifier_with_random_scores_is_refused(tmp_path: Path) -> None:
    """Reformer hashes with random rotations, in eval mode too."""
    settings: dict[str, Any] = {"attention_head_size": 8, "feed_forward_size": 16}
    settings |= {"attn_layers": ["lsh"], "num_buckets": 4, "lsh_attn_chunk_length": 4}
    settings |= {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [8, 8], "is_decoder": False}
    model = make_classifier("Reformer", positions=32, **settings)
    reward = SentimentReward(save(tmp_path, model))
    with pytest.raises(ModelError, match="scores the same text differently"):
        reward([" ".join(FILLER[:n]) for n in range(1, 25)])


def test_padding_that_harms_only_beside_long_rows_is_found_when_they_come(tmp_path: Path) -> None:
    class Leaking(transformers.DistilBertForSequenceClassification):
        def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            if input_ids.shape[1] > 12:
                out.logits = out.logits + (attention_mask == 0).sum(1, keepdim=True)
            return out

    model = make_classifier()
    reward = SentimentReward(save(tmp_path, model))
    reward.classifier.__class__ = Leaking
    short, long = ["w1 w2 w3", "w4"], ["w1", " ".join(FILLER[:16]), "w5 w6"]
    for texts in (short, long, short):
        expected = logits_one_by_one(model, make_word_tokenizer(), texts, 24)[:, 1]
        torch.testing.assert_close(reward(texts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["DistilBert", "Bart"])
def test_what_spells_a_special_token_is_text(tmp_path: Path, kind: str) -> None:
    """BART takes no two texts with different numbers of end tokens, and scores the last of them."""
    settings: dict[str, Any] = {}
    if kind == "Bart":
        settings = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "eos_token_id": 2}
        settings |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        settings |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "init_std": 0.4}
    reward = SentimentReward(save(tmp_path, make_classifier(kind, **settings)))
    scores = reward(["w1 w2", "w1 [SEP] w2", "w3", "w1 unknown w2"])
    assert scores.isfinite().all()
    ids = reward.tokenizer("w1 [SEP] w2").input_ids
    assert ids.count(2) == 1
    assert ids[-1] == 2


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


# ---------------------------------------------------------------- adapters


def adapt(base: str, folder: Path, **settings: Any) -> Any:
    """Save an adapter of a classifier, as after training, with its tokenizer; return the model."""
    outputs = settings.pop("outputs", 2)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=outputs
    )
    kind = settings.pop("kind", LoraConfig)
    torch.manual_seed(3)
    model = get_peft_model(classifier, kind(task_type="SEQ_CLS", **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    make_word_tokenizer(special="gpt2" not in base).save_pretrained(folder)
    return model


LORA = {"r": 2, "target_modules": ["q_lin", "v_lin"]}


def test_an_adapter_of_a_classifier_scores_as_peft_does(tmp_path: Path) -> None:
    base = save(tmp_path / "base", make_classifier(id2label={0: "bad", 1: "good"}))
    model = adapt(base, tmp_path / "adapter", modules_to_save=["pre_classifier"], **LORA)
    reward = SentimentReward(str(tmp_path / "adapter"), "good")
    assert reward.labels == ["bad", "good"]
    expected = logits_one_by_one(model, make_word_tokenizer(), TEXTS, 24)[:, 1]
    assert (SentimentReward(base, "good")(TEXTS) - expected).abs().max() > 0.1
    torch.testing.assert_close(reward(TEXTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 3])
def test_an_adapter_brings_the_head_that_its_language_model_lacks(
    tmp_path: Path, outputs: int
) -> None:
    """As with most reward models: the base has no head and no number of labels."""
    causal = make_gpt2(vocab_size=len(make_word_tokenizer()), n_positions=24, eos_token_id=2)
    base = save(tmp_path / "gpt2", causal, make_word_tokenizer(special=False))
    model = adapt(base, tmp_path / "adapter", outputs=outputs, target_modules=["c_attn"])
    (tmp_path / "adapter" / "tokenizer.json").unlink()  # the base model's will do
    (tmp_path / "adapter" / "tokenizer_config.json").unlink()
    reward = SentimentReward(str(tmp_path / "adapter"), "LABEL_0")
    assert reward.labels == [f"LABEL_{i}" for i in range(outputs)]
    texts = [text for text in TEXTS if text]
    expected = logits_one_by_one(model, make_word_tokenizer(special=False), texts, 24)[:, 0]
    torch.testing.assert_close(reward(texts), expected, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_of_an_adapter_take_their_share_of_what_is_read(tmp_path: Path) -> None:
    base = save(tmp_path / "base", make_classifier("Bert"))
    model = adapt(base, tmp_path / "adapter", kind=PromptTuningConfig, num_virtual_tokens=4)
    reward = SentimentReward(str(tmp_path / "adapter"))
    assert reward.max_length == 20
    texts = [*TEXTS, " ".join(FILLER)]
    with pytest.warns(UserWarning, match="1 of 8 texts"):
        scores = reward(texts)
    expected = logits_one_by_one(model, make_word_tokenizer(), texts, 20)[:, 1]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_its_head_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    base = make_gpt2(vocab_size=len(make_word_tokenizer()), n_positions=24)
    folder = save(tmp_path / "gpt2", base, make_word_tokenizer(special=False))
    adapt(folder, tmp_path / "adapter", target_modules=["c_attn"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    state = {key: value for key, value in load_file(weights).items() if "score" not in key}
    save_file(state, weights)
    with pytest.raises(ModelError, match=r"score\.weight.*random.*modules_to_save"):
        SentimentReward(str(tmp_path / "adapter"))


def test_an_adapter_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "gpt2", make_gpt2(), make_tokenizer())
    causal = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])
    get_peft_model(causal, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"task_type CAUSAL_LM.*SEQ_CLS"):
        SentimentReward(str(tmp_path / "adapter"))


def test_an_adapter_whose_base_model_is_gone_is_refused_with_both_names(tmp_path: Path) -> None:
    base = save(tmp_path / "base", make_classifier())
    adapt(base, tmp_path / "adapter", **LORA)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=f"{tmp_path}/adapter is an adapter.*{base}: no such"):
        SentimentReward(str(tmp_path / "adapter"))


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
