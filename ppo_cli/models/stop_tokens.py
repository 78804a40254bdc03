"""The tokens that end a response: end-of-text tokens, and tokens that contain a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_cli.data.chat import ChatEncoder
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.utils.text import shortened

SPACE_MARK = "▁"  # SentencePiece's sign for a space, which decoding drops at the beginning


def end_tokens(
    tokenizer: Any, stop: Sequence[str] = (), model: Any = None, *, chat: bool = False
) -> list[int]:
    """Ids of the tokens that end a response, in ascending order; empty where there are none.

    They are the tokenizer's end-of-text token, all those in the model's configurations (chat models
    have one for the end of a turn and one for the end of a text), the tokens that contain a text of
    `stop`, and for conversations the token with which the chat template ends a turn. Ids outside
    the vocabulary, which small models keep from a large one, are left out.

    A stop text has to be in one token, alone or with other characters: "." is also in " ." and
    '."'. It may be the text of a special token, such as "<|im_end|>". A stop text that the model
    spells with several tokens does not end a response.

    Args:
        tokenizer: the model's.
        stop: texts that end a response.
        model: has `config` and `generation_config`, as `transformers` does; None for the
            tokenizer's tokens alone.
        chat: whether responses are an assistant's turns.

    Raises:
        UsageError: no token contains one of `stop`, or there is no chat template.
        ModelError: an `eos_token_id` in a configuration is not an id.
    """
    vocabulary = _vocabulary(tokenizer, model)
    named = [tokenizer, *_configurations(model)]
    ids = [i for one in named for i in _listed(getattr(one, "eos_token_id", None))]
    if chat and (end := ChatEncoder(tokenizer).end_of_turn()) is not None:
        ids.append(end)
    ends = {i for i in ids if 0 <= i < vocabulary}
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


def _listed(ids: Any) -> list[int]:
    """`eos_token_id` of a configuration, which is one number, several or None, as a list.

    Raises:
        ModelError: something else is among them.
    """
    several = list(ids) if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
    if odd := [i for i in several if type(i) is not int]:
        raise ModelError(
            f"eos_token_id is {shortened(str(odd[0]), 40)!r} in a model's configuration, where the "
            "id of a token belongs: mend its config.json or generation_config.json"
        )
    return several


def _configurations(model: Any) -> list[Any]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return [config, text, getattr(model, "generation_config", None)]


def _vocabulary(tokenizer: Any, model: Any) -> int:
    """Number of ids: the model's, which may be more than the tokenizer's."""
    sizes = [getattr(one, "vocab_size", None) or 0 for one in _configurations(model)]
    return max(len(tokenizer), *sizes)


def _texts(tokenizer: Any) -> list[str]:
    """Text of every token, with spaces at its beginning."""
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        f" {text}" if str(piece).startswith(SPACE_MARK) and not text.startswith(" ") else text
        for text, piece in zip(texts, pieces, strict=True)
    ]
