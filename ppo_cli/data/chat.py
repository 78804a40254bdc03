"""Conversations: messages out of a row, and their token ids through the chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_cli.errors import DataError, UsageError
from ppo_cli.utils.text import shortened

Message = dict[str, Any]
"""`role` and `content`, and what else a template may read, such as `name`."""

# Names of ShareGPT and its relatives.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
PROBE = "PROBE"
# A private character on each side: no text of a template, and no part of a word.
MARK = "\ue000{}\ue001"
MARKED = re.compile("\ue000(\\d+)\ue001")


def messages_of(cell: Any, place: str, system: str | None = None) -> list[Message]:
    """The messages of a conversation, in the form that chat templates take.

    Args:
        cell: a user's message, or a list of messages: objects with `role` and `content`, or `from`
            and `value` as ShareGPT has them.
        place: of the row, for messages about errors.
        system: system prompt of a conversation that has none.

    Raises:
        DataError: a message has no role, or its content is not a text.
    """
    if isinstance(cell, str):
        messages = [{"role": "user", "content": cell}]
    else:
        messages = [_message(one, f"{place}, message {n}") for n, one in enumerate(cell, start=1)]
    if system and not any(message["role"] == "system" for message in messages[:1]):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(given: Any, place: str) -> Message:
    if not isinstance(given, dict):
        raise DataError(f"{place}: an object with role and content is needed")
    row = {key: value for key, value in given.items() if value is not None}
    role, content = row.pop("from", None), row.pop("value", None)
    role, content = row.pop("role", role), row.pop("content", content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{place}: a text is needed as role and as content (or as from and value), and it has "
            f"{shortened(str(given), 60)}"
        )
    return {"role": ROLES.get(role.lower(), role.lower()), "content": content, **row}


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages up to the last turn that is not the assistant's, and the answer after it."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end], messages[end]["content"] if end < len(messages) else None


def without_oldest(messages: list[Message]) -> list[Message]:
    """The messages without the oldest turn, up to the next one of the user; the system's stays.

    Empty where only one turn of the user is left.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > len(system)]
    return [*system, *messages[users[0] :]] if users else []


class ChatEncoder:
    """Encodes conversations as queries: through the chat template, up to the assistant's turn.

    Text of a message that spells a special token stays text: the template alone begins and ends
    turns.

    Args:
        tokenizer: has the chat template.
        name: of the model, for messages about errors.
        variables: of the template.

    Raises:
        UsageError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, name: str = "", variables: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name or str(getattr(tokenizer, "name_or_path", ""))
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"{shortened(self.name, 80)}: its tokenizer has no chat template, which "
                "conversations need: set prompts.chat_template to a Jinja file, take a model that "
                "was tuned for chat, or use texts (prompts.chat: false, no --chat)"
            )
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        added = getattr(tokenizer, "added_tokens_decoder", {})
        names = {*tokenizer.all_special_tokens, *(str(t) for t in added.values())}
        names = {name for name in names if name.strip()}
        spelled = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self._spelled = re.compile(spelled or r"(?!)")

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, the beginning of the assistant's turn included.

        Raises:
            DataError: the template refuses the conversation.
        """
        spans: list[str] = []

        def marked(found: re.Match[str]) -> str:
            spans.append(found[0])
            return MARK.format(len(spans) - 1)

        safe = [{**m, "content": self._spelled.sub(marked, m["content"])} for m in messages]
        parts = MARKED.split(self._render(safe))
        ids: list[int] = []
        for i, part in enumerate(parts):  # those at odd places are numbers of spans
            if i % 2:
                ids += as_text(self._tokenizer, spans[int(part)])
            elif part:
                ids += self._tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def _render(self, messages: list[Message], *, ask: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=ask, **self._variables
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            problem = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"the chat template of {shortened(self.name, 80)} refuses the conversation that "
                f"ends with '{shortened(messages[-1]['content'], 40)}': {problem}"
            ) from error

    def end_of_turn(self) -> int | None:
        """The token with which the template ends an assistant's turn; None where it has none.

        It is the first special token that the template writes after an answer.
        """
        question = {"role": "user", "content": PROBE}
        answer = {"role": "assistant", "content": PROBE}
        try:
            text = self._render([question, answer], ask=False)
        except DataError:  # a template of another kind; prompts will show
            return None
        rest = text.rpartition(PROBE)[2]
        special = {*self._tokenizer.all_special_ids}
        special |= {*getattr(self._tokenizer, "added_tokens_decoder", {})}
        ids = self._tokenizer(rest, add_special_tokens=False).input_ids
        return next((i for i in ids if i in special), None)


def as_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens, those that it spells included."""
    options = {} if getattr(tokenizer, "is_fast", None) is None else {"split_special_tokens": True}
    return list(tokenizer(text, add_special_tokens=False, **options).input_ids)
