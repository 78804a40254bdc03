"""The sentiment classifier as a reward: texts in, one score per text out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ppo_cli.errors import ModelError, UsageError
from ppo_cli.kernels.patches import fast_layers
from ppo_cli.models.context import UNLIMITED, context_length
from ppo_cli.models.pretrained import tokenizer_of
from ppo_cli.rewards.classifier import Padding, Row, is_same, load_classifier, rows_of
from ppo_cli.rewards.labels import polarity, polarity_of_index, resolve_label
from ppo_cli.utils.hub import loading_errors
from ppo_cli.utils.model_checks import refuse_empty, refuse_unusable

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
    """Scores texts. Any callable of this form can replace `SentimentReward`."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B,) scores, float32."""


class SentimentReward:
    """A sequence classifier's score of one of its labels.

    A text's score does not depend on the other texts of the batch. If a text is longer than the
    classifier can read, its end is scored, and there is one warning.

    Args:
        model: hub id or folder of a `transformers` sequence classifier, or of a peft adapter of
            one.
        sentiment: a label's name, its index, or a synonym: `positive`, `NEGATIVE`, `LABEL_1`,
            `5 stars`, `1`. Case does not matter. The single output of a reward model is chosen by
            its name, by `0` or by `positive`. Of several labels the scores are added; a mapping
            gives each a weight.
        output: `"logit"` for the raw logit of the label, `"probability"` for its probability.
        batch_size: texts per forward pass.
        tokenizer: hub id or folder of the tokenizer; None for the model's own.
        reads_special_tokens: whether the texts hold special tokens, as a chat template's do. If
            not, the spelling of one is read as text, and the tokenizer adds its own.
        device: the classifier's device.
        kwargs: arguments of `from_pretrained`, such as `revision`.

    Attributes:
        label: the label's name in the classifier; several with ` + ` between.
        labels: the names of all labels, in the order of the logits.
        max_length: maximum number of tokens that are read of a text, with special tokens.

    Raises:
        ModelNotFoundError: no such folder or hub model.
        ModelError: it cannot be loaded, or is no sequence classifier.
        UsageError: the classifier has no such label.
    """

    def __init__(
        self,
        model: str,
        sentiment: str | Sequence[str] | Mapping[str, float] = "positive",
        *,
        output: Literal["logit", "probability"] = "logit",
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        tokenizer: str | None = None,
        reads_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        if output not in ("logit", "probability"):
            raise UsageError(f"reward output {output!r} is neither 'logit' nor 'probability'")
        self.name = str(model)
        kwargs.setdefault("trust_remote_code", False)  # None would ask on the terminal
        self.output = output
        self.batch_size = batch_size
        with loading_errors(self.name, "classifier"):
            classifier, self.labels = load_classifier(self.name, **kwargs)
            self.classifier = classifier.to(device).eval()
        with loading_errors(tokenizer or self.name, "classifier"):
            own = kwargs if tokenizer is None else {"trust_remote_code": False}
            self.tokenizer = tokenizer_of(tokenizer or self.name, **own)
            refuse_unusable(self.name, self.tokenizer)
        refuse_empty(self.name, self.tokenizer)
        self.device = torch.device(device)
        self.tokenizer.truncation_side = "left"  # the response is at the end
        # The spelling of a special token is read as text: no response ends the classifier's input.
        self.tokenizer.split_special_tokens = not reads_special_tokens
        self._reads_special_tokens = reads_special_tokens
        self.max_length = self._max_length()
        self._padding = Padding(self.classifier, self.tokenizer)
        self._has_warned = False
        wanted = [sentiment] if isinstance(sentiment, str) else list(sentiment)
        self.sentiment = wanted[0]
        self._chosen = [resolve_label(label, self.labels) for label in wanted]
        if len({*self._chosen}) < len(wanted):
            raise UsageError(
                f"{' and '.join(wanted)} name one label of {self.name} twice: name each once"
            )
        self._weights = list(sentiment.values()) if isinstance(sentiment, Mapping) else None
        self.index = self._chosen[0]
        self.label = " + ".join(self.labels[index] for index in self._chosen)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B,) raw logits or probabilities of the label, on the CPU."""
        logits, probabilities = self.scores(texts)
        return logits if self.output == "logit" else probabilities

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts -> logits (B,) and probabilities (B,) of the label, float32, on the CPU.

        Those of several labels are added, with their weights. The probability of a single output is
        its sigmoid.

        Raises:
            ModelError: a score is not finite, or differs between two forwards.
        """
        logits, probabilities = self.of_labels(texts)
        if self._weights is None and len(self._chosen) == 1:
            return logits[:, 0], probabilities[:, 0]
        weights = torch.tensor(self._weights or [1.0] * len(self._chosen))
        return logits @ weights, probabilities @ weights

    def measure(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts -> scores (B,), as `__call__` gives them, and probabilities (B,) of the label.

        The probability of several labels is the sum of theirs, those with a weight below 0 left
        out; if the classifier has one output for each label by itself, it is the largest of theirs.
        """
        logits, probabilities = self.of_labels(texts)
        weights = torch.tensor(self._weights or [1.0] * len(self._chosen))
        values = logits if self.output == "logit" else probabilities
        if self._weights is None and len(self._chosen) == 1:
            return values[:, 0], probabilities[:, 0]
        wanted = probabilities * (weights > 0)
        return values @ weights, wanted.amax(1) if self._is_logistic() else wanted.sum(1)

    @torch.inference_mode()
    def of_labels(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts -> logits and probabilities (B, wanted labels), in the order they were given."""
        logits = self._logits(texts, self._rows(texts))
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(dim=1)).nonzero()[0])
            raise ModelError(
                f"{self.name} gave a score that is not finite to {texts[bad][:80]!r}: "
                "the classifier's weights are damaged, or its precision is too low"
            )
        probabilities = logits.sigmoid() if self._is_logistic() else logits.softmax(1)
        return logits[:, self._chosen], probabilities[:, self._chosen]

    def _rows(self, texts: Sequence[str]) -> list[Row]:
        """The tokens of each text, or of its end if it is too long."""
        tokenize = partial(
            self.tokenizer,
            return_attention_mask=False,
            verbose=False,
            add_special_tokens=not self._reads_special_tokens,
        )
        rows = rows_of(tokenize(list(texts))) if texts else []
        long = [i for i, row in enumerate(rows) if len(row["input_ids"]) > self.max_length]
        if long:
            cut = tokenize([texts[i] for i in long], truncation=True, max_length=self.max_length)
            for i, row in zip(long, rows_of(cut), strict=True):
                rows[i] = row
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{len(long)} of {len(texts)} texts are longer than the {self.max_length} "
                    f"tokens that {self.name} reads: only their ends are scored. Give shorter "
                    "prompts, or a classifier that reads more",
                    stacklevel=4,
                )
        return rows

    def _logits(self, texts: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """Rows -> their logits (B, labels)."""
        logits = torch.empty(len(rows), len(self.labels))
        for chosen in self._padding.batches(texts, rows, self.batch_size):
            batch = [rows[i] for i in chosen]
            logits[chosen] = self._forward(batch)
            if tried := self._padding.untried(batch):
                alone = torch.cat([self._forward([batch[i]]) for i in tried])
                if not self._padding.is_harmless(logits[[chosen[i] for i in tried]], alone):
                    again = torch.cat([self._forward([batch[i]]) for i in tried])
                    if not is_same(alone, again):
                        raise ModelError(
                            f"{self.name} scores the same text differently each time: choose "
                            "another classifier"
                        )
                    return self._logits(texts, rows)  # again, now without padding
        return logits

    def _forward(self, rows: Sequence[Row]) -> Tensor:
        batch = {key: value.to(self.device) for key, value in self._padding.padded(rows).items()}
        with fast_layers():
            return self.classifier(**batch).logits.float().cpu()

    def probe(self) -> None:
        """Score clearly positive and clearly negative sentences; with several labels do nothing.

        Raises:
            UsageError: for a label that names a sentiment, the wrong sentences have the higher
                scores; or the scores hardly differ.
        """
        if len(self._chosen) > 1:
            return
        logits, probabilities = self.of_labels([*PROBES["positive"], *PROBES["negative"]])
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
        expected = polarity(self.label) or polarity_of_index(self.index, self.labels)
        if len(self.labels) == 1:
            expected = polarity(self.label) or polarity(self.sentiment)
        if expected and (gap > 0) != (expected > 0):
            remedy = f"Choose the other label (labels: {', '.join(self.labels)})"
            if len(self.labels) == 1:
                remedy = "Choose another classifier (reward.model)"
            raise UsageError(
                f"{seen}: its labels are reversed. {remedy}, or set reward.probe=false if that is "
                "meant"
            )

    def _is_logistic(self) -> bool:
        """Whether each output has a probability of its own."""
        is_multi_label = self.classifier.config.problem_type == "multi_label_classification"
        return len(self.labels) == 1 or is_multi_label

    def _max_length(self) -> int:
        limits = [context_length(self.classifier), self.tokenizer.model_max_length]
        known = [limit for limit in limits if limit is not None and 0 < limit < UNLIMITED]
        adapters = getattr(self.classifier, "peft_config", {}).values()
        virtual = sum(getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters)
        return min(known, default=512) - virtual
