"""What rewards are computed from: texts, data columns and token ids of a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ppo_cli.config.reward import TEMPLATE_FIELD
from ppo_cli.errors import UsageError
from ppo_cli.models.sampling import Rollout

MESSAGES = "messages"


@dataclass(frozen=True)
class RewardBatch:
    """B responses to score.

    Attributes:
        texts: B strings, query and response together; of a conversation, and of an
            encoder-decoder, the response alone.
        queries, responses: B strings each, the parts.
        columns: name -> B values, the data's other columns; conversations are `messages`.
        messages: B conversations that were answered, None for texts; empty where there are none.
        continues: whether responses to texts continue them; those of an encoder-decoder do not.
        response_ids: B tensors of token ids, 1-D; None where there are texts alone.
        end_ids: tokens that end a response.
    """

    texts: Sequence[str]
    queries: Sequence[str] = ()
    responses: Sequence[str] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    response_ids: Sequence[Tensor] | None = None
    end_ids: Collection[int] = ()
    messages: Sequence[list[dict[str, Any]] | None] = ()
    continues: bool = True

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        queries: Sequence[str],
        rows: Sequence[Mapping[str, Any]] | None = None,
        end_ids: Collection[int] = (),
    ) -> RewardBatch:
        """The batch of B sampled responses.

        Args:
            rollout: texts and tokens.
            queries: B texts.
            rows: the columns of each prompt; a row without a column has None there.
            end_ids: tokens that end a response.
        """
        names = dict.fromkeys(name for row in rows or () for name in row)
        columns = {name: [row.get(name) for row in rows or ()] for name in names}
        return cls(
            rollout.texts,
            queries,
            rollout.response_texts,
            columns,
            rollout.responses,
            end_ids,
            rollout.messages,
            rollout.continues,
        )

    @property
    def token_ids(self) -> Sequence[Tensor]:
        """The responses' token ids.

        Raises:
            UsageError: there are texts alone.
        """
        if self.response_ids is None:
            raise UsageError("a reward reads the responses' tokens: give response_ids")
        return self.response_ids

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        """The messages of each row; a query without any is one message of a user."""
        rows = self.columns.get(MESSAGES) or [None] * len(self.texts)
        return [
            list(messages) if messages else [{"role": "user", "content": query}]
            for messages, query in zip(rows, self.queries, strict=True)
        ]

    def take(self, owners: Sequence[int], texts: Sequence[str]) -> RewardBatch:
        """The beginnings `texts` of the rows `owners`, for scores of unfinished texts."""
        queries = [self.queries[i] for i in owners]
        messages = [self.messages[i] if self.messages else None for i in owners]
        responses = [
            text.removeprefix(query) if conversation is None and self.continues else text
            for text, query, conversation in zip(texts, queries, messages, strict=True)
        ]
        columns = {name: [values[i] for i in owners] for name, values in self.columns.items()}
        return RewardBatch(
            texts, queries, responses, columns, messages=messages, continues=self.continues
        )


def filled(template: str, batch: RewardBatch) -> Sequence[str]:
    """The text of each row: `template` with {text}, {query} and {response} filled in."""
    if template == "{text}":
        return batch.texts
    values = {"text": batch.texts, "query": batch.queries, "response": batch.responses}
    return [
        TEMPLATE_FIELD.sub(lambda field, i=i: values[field[1]][i], template)  # type: ignore[misc]
        for i in range(len(batch.texts))
    ]
