"""Which tokens end a response: the end-of-text token, and those that hold a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_cli.errors import UsageError
from ppo_cli.text import shortened

SPACE_MARK = "▁"  # what SentencePiece writes for a space, which decoding drops at the beginning


def end_tokens(tokenizer: Any, stop: Sequence[str] = ()) -> list[int]:
    """Ids of the tokens that end a response, in ascending order; none where there is nothing.

    A text stops where one token holds it, alone or with other characters: "." is in " ." and
    '."' too. It may be a special token's own text, such as "<|im_end|>", too. A text that the
    model spells with several tokens does not stop.

    Raises:
        UsageError: no token holds one of `stop`.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if stop:
        texts = _texts(tokenizer)
        special = set(tokenizer.all_special_ids)
        for wanted in stop:
            found = {
                i
                for i, text in enumerate(texts)
                if (text == wanted if i in special else wanted in text)
            }
            if not found:
                raise UsageError(
                    f"rollout.stop: no token of {shortened(str(tokenizer.name_or_path), 60)} holds "
                    f"{shortened(wanted, 40)!r}: give texts that one token can hold, such as '.' "
                    "or a line end, or leave it out"
                )
            ends |= found
    return sorted(ends)


def _texts(tokenizer: Any) -> list[str]:
    """Text of every token, spaces at its beginning included."""
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        f" {text}" if str(piece).startswith(SPACE_MARK) and not text.startswith(" ") else text
        for text, piece in zip(texts, pieces, strict=True)
    ]
