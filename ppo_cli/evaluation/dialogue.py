"""Prompts and responses in turn, each response shown while it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import TextStreamer

from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.data.chat import Message, messages_of, without_oldest
from ppo_cli.data.prompts import PromptEncoder
from ppo_cli.data.rows import Row
from ppo_cli.evaluation.draw_samples import score_rollout
from ppo_cli.evaluation.generate import Loaded, check_room, sampling_errors
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.context import context_length, context_used
from ppo_cli.models.sampling import sample_responses, to_texts
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.transformers_generate import GenerateSettings
from ppo_cli.rewards.reward_sum import RewardSum
from ppo_cli.utils.random_state import RandomStream

Write = Callable[[str], None]


class Dialogue:
    """Answers prompts in turn: texts, each on its own, or with `chat` one conversation.

    Args:
        loaded: the model.
        prompts: whether the prompts are a user's messages, and their system prompt.
        params: settings of sampling.
        max_new_tokens: limit on a response.
        seed: of all random numbers.
        reward: scores the responses; None leaves scores out.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompts: PromptsConfig,
        params: SamplingParams,
        *,
        max_new_tokens: int,
        seed: int,
        reward: RewardSum | None = None,
    ) -> None:
        self._loaded = loaded
        self._prompts = prompts
        self._params = loaded.params(params)
        self._max_new_tokens = max_new_tokens
        self._random = RandomStream(seed, loaded.model.device)
        self._reward = reward
        self._encoder = PromptEncoder(
            loaded.tokenizer, prompts, name=loaded.name, complete=loaded.is_encoder_decoder
        )
        self._messages: list[Message] = []

    def answer(self, text: str, write: Write) -> Sample:
        """Answer a prompt; in a conversation prompt and answer become part of it.

        Args:
            text: the prompt.
            write: called with each piece of the response, while it is sampled.

        Raises:
            DataError: the prompt has no tokens, or exceeds the model's context.
        """
        row, ids = self._query(text)
        query = torch.tensor(ids, device=self._loaded.model.device)
        streamer = _Streamer(self._loaded.tokenizer, write)
        settings = GenerateSettings.of(self._params)
        settings = replace(settings, kwargs={**settings.kwargs, "streamer": streamer})
        with sampling_errors(self._loaded.name), self._random.active():
            limits = [self._max_new_tokens]
            responses = sample_responses(self._loaded.model, [query], limits, settings)
        rollout = to_texts(
            self._loaded.tokenizer,
            [query],
            responses,
            [row.messages],
            continues=not self._loaded.is_encoder_decoder,
        )
        (sample,) = score_rollout(
            rollout, [row.text], self._reward, [row.columns], self._loaded.stop_token_ids
        )
        if row.messages is not None:
            answer = {"role": "assistant", "content": sample.response.strip()}
            self._messages = [*row.messages, answer]
        return sample

    def _query(self, text: str) -> tuple[Row, list[int]]:
        """The prompt and its tokens; of a long conversation the oldest turns are left out."""
        if not self._prompts.chat:
            row = Row(text)
            (ids,) = self._encoder.ids([row])
        else:
            messages = [*self._messages, *messages_of(text, "prompt")]
            if not self._messages:
                messages = messages_of(text, "prompt", self._prompts.system)
            row, ids = self._fitting(messages)
        check_room(self._loaded, [text], [ids], self._max_new_tokens)
        return row, ids

    def _fitting(self, messages: list[Message]) -> tuple[Row, list[int]]:
        context = context_length(self._loaded.model)
        while True:
            row = Row(messages[-1]["content"], {"messages": messages}, messages)
            (ids,) = self._encoder.ids([row])
            shorter = without_oldest(messages)
            used = context_used(self._loaded.model, len(ids), self._max_new_tokens)
            if context is None or used <= context or not shorter:
                return row, ids
            messages = shorter


class _Streamer(TextStreamer):
    """Passes on the text of a response, whole words at a time."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate` with each new piece of text."""
        if text:
            self._write(text)
