"""Rewards: texts in, one score a text out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ppo_cli.errors import ModelError, UsageError, did_you_mean
from ppo_cli.hub import (
    implementations,
    loading_errors,
    refuse_empty,
    refuse_misshaped,
    refuse_missing,
    refuse_unusable,
)
from ppo_cli.matmul import fast_matmul

POSITIVE_NAMES = ("positive", "pos", "good", "favorable", "favourable", "5 stars", "very positive")
NEGATIVE_NAMES = (
    "negative",
    "neg",
    "bad",
    "unfavorable",
    "unfavourable",
    "1 star",
    "very negative",
)
PROBES = {
    "positive": (
        "This movie was wonderful, I loved every minute of it.",
        "An excellent film with great acting.",
    ),
    "negative": (
        "This movie was terrible, I hated every minute of it.",
        "An awful film, a boring waste of time.",
    ),
}


class RewardFunction(Protocol):
    """Scores texts. Any callable of this form can take `SentimentReward`'s place."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B,) scores, float32."""


class SentimentReward:
    """The score that a sequence classifier gives to one of its labels.

    Args:
        model: hub id or folder of a `transformers` sequence classifier.
        sentiment: a label's name, its index, or a synonym: `positive`, `NEGATIVE`, `LABEL_1`,
            `5 stars`, `1`. Case does not matter.
        output: `"logit"` for the raw logit of the label, `"probability"` for its probability.
        batch_size: texts a forward pass.
        device: where the classifier runs.
        kwargs: go to `from_pretrained`, `revision` for example.

    Attributes:
        label: the label's name as the classifier has it.

    Raises:
        ModelNotFoundError: no such folder or hub model.
        ModelError: it cannot be loaded, or is no sequence classifier.
        UsageError: the classifier has no label of that name.
    """

    def __init__(
        self,
        model: str,
        sentiment: str = "positive",
        *,
        output: Literal["logit", "probability"] = "logit",
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        from transformers import AutoTokenizer

        if output not in ("logit", "probability"):
            raise UsageError(f"reward output {output!r} is neither 'logit' nor 'probability'")
        self.name = str(model)
        kwargs.setdefault("trust_remote_code", False)  # None would ask on the terminal
        self.output = output
        self.batch_size = batch_size
        with loading_errors(self.name, "classifier"):
            self.classifier = _load_classifier(self.name, **kwargs).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, **kwargs)
            refuse_unusable(self.name, self.tokenizer)
        refuse_empty(self.name, self.tokenizer)
        self.device = torch.device(device)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        # Decoder classifiers look for the last token that is not padding.
        self.classifier.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        if self.classifier.config.model_type != "xlnet":  # which reads the last place
            self.tokenizer.padding_side = "right"
        self.max_length = self._max_length()
        self.labels = _labels(self.classifier.config)
        self.index = resolve_label(sentiment, self.labels)
        self.label = self.labels[self.index]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B,) raw logits or probabilities of the label, on the CPU."""
        logits, probabilities = self.scores(texts)
        return logits if self.output == "logit" else probabilities

    @torch.inference_mode()
    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts -> logits (B,) and probabilities (B,) of the label, float32, on the CPU.

        Texts are cut to the classifier's length. A classifier with a single output is read as a
        logistic one: its negative label has minus its logit.

        Raises:
            ModelError: a score is not finite.
        """
        if not self.tokenizer("").input_ids:  # no special tokens: nothing to score
            texts = [t if self.tokenizer(t).input_ids else self.tokenizer.pad_token for t in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together
        logits = torch.empty(len(texts), max(len(self.labels), 2))
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            with fast_matmul():
                out = self.classifier(**batch).logits.float().cpu()
            logits[rows] = torch.cat([-out, out], dim=1) if out.shape[1] == 1 else out
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(dim=1)).nonzero()[0])
            raise ModelError(
                f"{self.name} gave a score that is not finite to {texts[bad][:80]!r}: "
                "the classifier's weights are damaged, or its precision is too low"
            )
        chosen = logits[:, self.index]
        single = self.classifier.config.num_labels == 1
        probabilities = (
            chosen.sigmoid()
            if single or self._is_multi_label()
            else logits.softmax(1)[:, self.index]
        )
        return chosen, probabilities

    def probe(self) -> None:
        """Score clearly positive and clearly negative sentences.

        Raises:
            UsageError: the classifier prefers the wrong ones for a label that names a sentiment,
                or tells them hardly apart whatever the label.
        """
        logits, probabilities = self.scores([*PROBES["positive"], *PROBES["negative"]])
        n = len(PROBES["positive"])
        gap = (logits[:n].mean() - logits[n:].mean()).item()
        share = [probabilities[:n].mean().item(), probabilities[n:].mean().item()]
        seen = (
            f"{self.name} gives label '{self.label}' a mean probability of {share[0]:.2f} on "
            f"clearly positive and {share[1]:.2f} on clearly negative sentences"
        )
        if abs(gap) < 0.2:
            raise UsageError(
                f"{seen}: it does not tell sentiment apart. Choose a sentiment classifier "
                "(reward.model), or set reward.probe=false if that is meant"
            )
        expected = _polarity(self.label) or _polarity_of_index(self.index, self.labels)
        if expected and (gap > 0) != (expected > 0):
            raise UsageError(
                f"{seen}: its labels are reversed. Choose the other label (labels: "
                f"{', '.join(self.labels)}), or set reward.probe=false if that is meant"
            )

    def _is_multi_label(self) -> bool:
        return self.classifier.config.problem_type == "multi_label_classification"

    def _max_length(self) -> int:
        config = self.classifier.config.get_text_config()
        limits = [
            getattr(config, "max_position_embeddings", None),
            self.tokenizer.model_max_length,
        ]
        known = [limit for limit in limits if limit is not None and 0 < limit < 10**6]
        # Positions that begin after the padding index, as RoBERTa's, leave the first rows unused.
        unused = [
            module.padding_idx + 1
            for name, module in self.classifier.named_modules()
            if name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ]
        if unused and known:
            known.append(config.max_position_embeddings - unused[0])
        return min(known, default=512)


def resolve_label(sentiment: str, labels: Sequence[str]) -> int:
    """Index of the label that `sentiment` names.

    Tried in turn, case ignored: a label's own name; its index; for a word that means positive or
    negative, a label that means the same; and for two labels without a meaning (`LABEL_0`,
    `LABEL_1`) the second as positive, the first as negative, which `SentimentReward.probe` checks.

    Raises:
        UsageError: nothing matches; the message lists the labels.
    """
    wanted = _normal(sentiment)
    names = [_normal(label) for label in labels]
    if wanted in names:
        return names.index(wanted)
    index = sentiment.strip()
    if index.isascii() and index.isdigit() and int(index) < len(labels):
        return int(index)
    polarity = _polarity(sentiment)
    if polarity:
        synonyms = POSITIVE_NAMES if polarity > 0 else NEGATIVE_NAMES
        for synonym in synonyms:
            if synonym in names:
                return names.index(synonym)
        if _nameless(labels):
            return 1 if polarity > 0 else 0
    raise UsageError(
        f"the classifier has no label '{sentiment}'; its labels are "
        f"{', '.join(labels)}.{did_you_mean(sentiment, labels) or ' Choose one with --sentiment'}"
    )


def _load_classifier(name: str, **kwargs: Any) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name, **kwargs)
    architectures = config.architectures or []
    if architectures and not any(
        item.endswith("ForSequenceClassification") for item in architectures
    ):
        raise ModelError(
            f"{name} is a {architectures[0]}, not a sequence classifier: choose one whose "
            "architecture ends in ForSequenceClassification"
        )
    kwargs |= implementations(name, config, kwargs["trust_remote_code"])
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused here, by name
        **kwargs,
    )
    refuse_misshaped(name, info["mismatched_keys"])
    refuse_missing(name, info["missing_keys"])
    return model


def _labels(config: Any) -> list[str]:
    if config.num_labels == 1:
        return ["NEGATIVE", "POSITIVE"]
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _normal(name: str) -> str:
    return " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())


def _polarity(name: str) -> int:
    """1 for a word that means positive, -1 for negative, 0 for neither."""
    normal = _normal(name)
    return (normal in POSITIVE_NAMES) - (normal in NEGATIVE_NAMES)


def _polarity_of_index(index: int, labels: Sequence[str]) -> int:
    """What two nameless labels are by custom: the first negative, the second positive."""
    if not _nameless(labels):
        return 0
    return 1 if index == 1 else -1


def _nameless(labels: Sequence[str]) -> bool:
    return len(labels) == 2 and all(re.fullmatch(r"label \d", _normal(name)) for name in labels)
