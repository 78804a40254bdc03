"""Token ids of texts that a model shall continue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

TOKENIZER_BATCH = 1000  # texts
PROBE = "a"
MAX_CHARACTERS = 5  # per token, more than prose has
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
ACROSS_WORDS = re.compile(
    r"[^\sĠĊĉč▁][ Ġ▁]"
)  # a token with a gap between words, in the form of byte-level or SentencePiece


class Encoder:
    """Encodes texts as queries.

    Special tokens that the tokenizer puts before a text, such as <s>, are part of the query. Those
    after it, such as </s> or [SEP], are part of a complete text alone: a causal model continues the
    text. Text that spells a special token stays text, where the tokenizer can distinguish the two.

    Args:
        tokenizer: of the model that reads the queries.
        complete: whether the texts are complete, as the encoder of an encoder-decoder reads them.

    Attributes:
        beginning: ids of the special tokens before a text.
        ending: ids of those after it; empty where texts are to be continued.
    """

    def __init__(self, tokenizer: Any, *, complete: bool = False) -> None:
        self._tokenizer = tokenizer
        whole = tokenizer(PROBE).input_ids
        text = self._ids([PROBE])[0]
        places = range(len(whole) - len(text) + 1)
        before = next((i for i in places if whole[i : i + len(text)] == text), None)
        self.beginning = list(whole[: before or 0])
        self.ending: list[int] = []
        if complete and before is not None:
            self.ending = list(whole[before + len(text) :])

    def __call__(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """Encode texts, without `ending`; a text without tokens gives an empty list.

        Args:
            texts: the texts to continue.
            longest: number of ids to return of each text; the rest of a long text is not encoded
                where that cannot change them.
        """
        starts = [self._start(text, longest) for text in texts]
        rows = self._ids(starts)
        if longest is not None:
            wanted = longest - len(self.beginning)
            short = [
                i
                for i, row in enumerate(rows)
                if len(row) < wanted and len(starts[i]) < len(texts[i])
            ]
            for i, row in zip(short, self._ids([texts[i] for i in short]), strict=True):
                rows[i] = row
        return [(self.beginning + row)[:longest] if row else [] for row in rows]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode the texts without special tokens."""
        tokenizer, rows = self._tokenizer, []
        is_fast = getattr(
            tokenizer, "is_fast", None
        )  # None: mistral-common's, which takes no text for special tokens
        if is_fast:
            for i in range(0, len(texts), TOKENIZER_BATCH):
                batch = list(texts[i : i + TOKENIZER_BATCH])
                rows += tokenizer(
                    batch, add_special_tokens=False, split_special_tokens=True
                ).input_ids
            return rows
        special = [] if is_fast is None else tokenizer.all_special_tokens
        for text in texts:
            # With this option, tokenizers in Python split all added tokens, not only special ones.
            spelled = any(token in text for token in special)
            options = {"split_special_tokens": True} if spelled else {}
            rows.append(list(tokenizer(text, add_special_tokens=False, **options).input_ids))
        return rows

    def _start(self, text: str, longest: int | None) -> str:
        """The start of a text, cut between words, that should hold `longest` tokens."""
        if longest is None:
            return text
        size = MAX_CHARACTERS * longest + 64
        if len(text) <= size or not self._reads_words_apart:
            return text
        gaps = [gap.start() for gap in BETWEEN_WORDS.finditer(text, size - 64, size)]
        return (
            text[: gaps[-3]] if len(gaps) > 2 else text
        )  # the last token may depend on two more words

    @cached_property
    def _reads_words_apart(self) -> bool:
        """Whether the tokens before a gap between words do not depend on the text after it.

        BPE merges two tokens of its vocabulary into a third, and Unigram chooses among sequences of
        its tokens. If no token contains a gap, neither looks across one. Normalizers and
        pre-tokenizers look no further than the next word.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            return False
        model = self._tokenizer.backend_tokenizer.model
        kind = type(model).__name__
        if kind != "Unigram" and (kind != "BPE" or model.end_of_word_suffix):
            return False
        return not any(map(ACROSS_WORDS.search, self._tokenizer.get_vocab()))
