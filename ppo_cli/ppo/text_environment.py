"""Text environments: a policy calls tools in what it writes, and learns from its own tokens alone.

The names and the syntax of a call are those of TRL 0.11.4: the policy writes
`<request><TOOL>query<call>`, the environment answers with the tool's result and `<response>`, and
`<submit>` ends an episode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich
import torch
from accelerate.utils import extract_model_from_parallel
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_cli.errors import UsageError
from ppo_cli.models.context import UNLIMITED, context_length
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.sharding import gathered
from ppo_cli.models.transformers_generate import new_token_limits
from ppo_cli.ppo.accelerator import require
from ppo_cli.ppo.generation import generation_settings
from ppo_cli.utils.text import escape_controls


class TextHistory:
    """An episode: the prompt, then turns of the model and answers of tools, as text and tokens.

    Args:
        text: of the first segment, the prompt.
        tokens: its token ids, 1-D.
        system: whether the model did not write it.

    Attributes:
        text, tokens: of the whole episode.
        token_masks: 1 for each token that the model wrote, else 0, as long as `tokens`.
        text_spans, token_spans, system_spans: start and end of each segment, and its `system`.
        completed: whether the episode has ended.
        truncated: whether it ended because it has no room for more tokens.
        reward: the environment's reward, 0 until it is known.
    """

    prompt_color = "black on grey85"
    system_color = "black on cyan3"
    model_color = "black on deep_sky_blue1"
    reward_color = "black on plum1"

    def __init__(self, text: str, tokens: Tensor, system: bool = True) -> None:
        self.text = ""
        self.tokens = tokens.new_empty(0)
        self.token_masks = tokens.new_empty(0)
        self.text_spans: list[tuple[int, int]] = []
        self.token_spans: list[tuple[int, int]] = []
        self.system_spans: list[bool] = []
        self.completed = self.truncated = False
        self.reward: Any = 0.0
        self.append_segment(text, tokens, system)

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        """Add a segment; `system` says that the model did not write it.

        Raises:
            ValueError: it has no tokens.
        """
        if not len(tokens):
            raise ValueError("a segment needs tokens: begin an empty prompt with the bos token")
        self.text_spans.append((len(self.text), len(self.text) + len(text)))
        self.token_spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.system_spans.append(system)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens)])
        self.token_masks = torch.cat(
            [self.token_masks, self.tokens.new_full((len(tokens),), int(not system))]
        )

    def complete(self, truncated: bool = False) -> None:
        """End the episode."""
        self.completed, self.truncated = True, truncated

    @property
    def last_text_segment(self) -> str:
        """The text of the last segment."""
        start, end = self.text_spans[-1]
        return self.text[start:end]

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query (the prompt), response and response mask, for `PPOTrainer.step`."""
        start = self.token_spans[0][1]
        return self.tokens[:start], self.tokens[start:], self.token_masks[start:]

    def show_text(self, show_legend: bool = False) -> None:
        """Print the text, a colour for each kind of segment."""
        shown = Text()
        for i, (start, end) in enumerate(self.text_spans):
            segment = escape_controls(self.text[start:end], keep_lines=True)
            shown.append(segment, self._color(i))
        self._show(shown, show_legend)

    def show_tokens(self, tokenizer: Any, show_legend: bool = False) -> None:
        """Print the tokens, a colour for each kind of segment."""
        shown = Text()
        for i, (start, end) in enumerate(self.token_spans):
            for token in tokenizer.convert_ids_to_tokens(self.tokens[start:end].tolist()):
                shown.append(escape_controls(str(token)), self._color(i)).append(" ")
        self._show(shown, show_legend)

    def show_colour_legend(self) -> None:
        """Print what the colours mean."""
        kinds = ("prompt", "system", "model", "reward")
        parts = [(kind.capitalize(), getattr(self, f"{kind}_color")) for kind in kinds]
        rich.print(Text("\n(Colour Legend: ") + Text("|").join(Text(*p) for p in parts) + Text(")"))

    def _color(self, segment: int) -> str:
        written = self.system_color if self.system_spans[segment] else self.model_color
        return written if segment else self.prompt_color

    def _show(self, shown: Text, show_legend: bool) -> None:
        rich.print(shown.append(f"\n\nReward: {self.reward}", self.reward_color))
        if show_legend:
            self.show_colour_legend()


class TextEnvironment:
    """Episodes in which a policy answers tasks with the help of tools.

    Args:
        model: the policy; `trainer.model` will do.
        tokenizer: the policy's.
        tools: functions from a query to its result, by name, or a list of them, which are called by
            the names of their classes, or their own if they are functions.
        reward_fn: called with the last segment of each episode, and the keywords of `run`; returns
            a number for each.
        prompt: comes before each task.
        max_turns: turns of the model in an episode.
        max_tool_reponse: characters of a tool's result that are kept; `max_tool_response` is the
            same.
        max_length: tokens of an episode; never more than the model reads.
        generation_kwargs: settings of `transformers`' `generate`. Where they are silent, sampling
            is as in `PPOTrainer.generate`: temperature 1, no top-k, no top-p, 20 new tokens a turn.

    Raises:
        ValueError: an argument has the wrong type, or a call cannot name a tool of the list.
    """

    request_token, call_token = "<request>", "<call>"
    response_token, submit_token = "<response>", "<submit>"

    def __init__(
        self,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tools: Mapping[str, Callable] | Sequence[Callable] | None = None,
        reward_fn: Callable[..., Any] | None = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        max_tool_response: int | None = None,
    ) -> None:
        require("tokenizer", tokenizer, PreTrainedTokenizerBase)
        assert tokenizer is not None
        is_model = isinstance(model, torch.nn.Module)
        if not is_model or not hasattr(extract_model_from_parallel(model), "generate"):
            raise ValueError(f"model must be a language model, got {type(model).__name__}")
        if not callable(reward_fn):
            raise ValueError(f"reward_fn must be a function, got {type(reward_fn).__name__}")
        self.model, self.tokenizer = model, tokenizer
        if is_encoder_decoder(self._policy):
            raise ValueError("model must be causal: an encoder-decoder does not continue a text")
        self._context = context_length(self._policy) or UNLIMITED
        self.tools = _by_name(tools or {})
        self.reward_fn = reward_fn
        self.prompt = prompt or ""
        self.max_turns = max_turns
        kept = max_tool_reponse if max_tool_response is None else max_tool_response
        self.max_tool_response = kept
        self.max_length = max_length
        self.generation_kwargs = dict(generation_kwargs or {})

    def run(
        self, queries: Sequence[str], **reward_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[TextHistory]]:
        """An episode for each task.

        Args:
            queries: B tasks.
            reward_kwargs: go to `reward_fn`.

        Returns:
            B query tensors, response tensors, response masks and rewards, for
            `trainer.step(queries, responses, rewards, masks)`, and the B histories.

        Raises:
            UsageError: a task leaves no room for a response, or `reward_fn` does not return a
                number for each.
        """
        histories = [
            TextHistory(text, self._encode(text, True))
            for text in (self.prompt + q for q in queries)
        ]
        for i, history in enumerate(histories):
            if (room := self._room(history.tokens)) < 1:
                raise UsageError(
                    f"task {i} has {len(history.tokens)} tokens with its prompt, and an episode at "
                    f"most {len(history.tokens) + room}: shorten it, or raise max_length"
                )
        with gathered(self._policy):  # each process takes as many turns as its episodes need
            for _ in range(self.max_turns):
                if all(history.completed for history in histories):
                    break
                histories = self.tasks_end_check(self.generate(histories))
                histories = [self.step(history) for history in histories]
                histories = self.tasks_end_check(histories, model_turn=False)
        self.compute_reward(histories, **reward_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        query_tensors, responses, masks = ([part[i] for part in parts] for i in range(3))
        rewards = [torch.as_tensor(history.reward, dtype=torch.float32) for history in histories]
        return query_tensors, responses, masks, rewards, histories

    def step(self, history: TextHistory) -> TextHistory:
        """Answer the call at the end of an episode; nothing happens where that has ended."""
        truncated, ended = self.task_end_check(history)
        if ended:
            history.complete(truncated)
        if history.completed:
            return history
        answer = self._answer(history.last_text_segment)
        if len(answer) > self.max_tool_response:
            answer = answer[: max(self.max_tool_response - 3, 0)] + "..."
        tokens = self._encode(answer + self.response_token, False)
        if len(tokens) > self._room(history.tokens):
            history.complete(truncated=True)
        else:
            history.append_segment(answer + self.response_token, tokens)
        return history

    def _answer(self, text: str) -> str:
        tool, query = self.parse_tool_call(text)
        if tool is None:
            return f"Unknown tool call: {text}"
        if tool not in self.tools:
            return f"Unknown tool {tool}."
        try:
            return str(self.tools[tool](query))
        except Exception as error:  # the policy reads it, and may do better
            return f"Tool error: {error}"

    def parse_tool_call(self, text: str) -> tuple[str | None, str | None]:
        """Name of the tool and query in `<request><TOOL>query<call>`; two None in another text."""
        request, end = re.escape(self.request_token), re.escape(self.call_token)
        call = re.search(f"{request}(.*?){end}", text, re.DOTALL)
        found = re.search(r"<(.*?)>", call[1]) if call else None
        if call is None or found is None:
            return None, None
        return found[1], call[1].partition(">")[2]

    def compute_reward(
        self, histories: list[TextHistory], **reward_kwargs: Any
    ) -> list[TextHistory]:
        """Set the reward of each episode.

        Raises:
            UsageError: `reward_fn` does not return one for each.
        """
        texts = [history.last_text_segment for history in histories]
        rewards = list(self.reward_fn(texts, **reward_kwargs))
        if len(rewards) != len(histories):
            raise UsageError(
                f"reward_fn returned {len(rewards)} rewards for {len(histories)} episodes"
            )
        for history, reward in zip(histories, rewards, strict=True):
            history.reward = reward
        return histories

    def generate(self, histories: list[TextHistory]) -> list[TextHistory]:
        """A turn of the model in each episode that has not ended."""
        active = [history for history in histories if not history.completed]
        responses = self._generate_batched([history.tokens for history in active])
        texts = self.tokenizer.batch_decode(responses)
        for history, text, response in zip(active, texts, responses, strict=True):
            history.append_segment(text, response, system=False)
        return histories

    def tasks_end_check(
        self, histories: list[TextHistory], model_turn: bool = True
    ) -> list[TextHistory]:
        """Complete the episodes that have ended."""
        for history in histories:
            truncated, ended = self.task_end_check(history, model_turn)
            if ended:
                history.complete(truncated)
        return histories

    def task_end_check(self, history: TextHistory, model_turn: bool = True) -> tuple[bool, bool]:
        """Whether an episode was truncated, and whether it has ended, after a turn or an answer.

        The model ends it by `<submit>`, an end token, or a turn without a call. What a tool
        answers does not end it.
        """
        if history.completed:
            return False, False
        turn = history.last_text_segment if model_turn else ""
        end = self.tokenizer.eos_token
        if self.submit_token in turn or (end and end in turn):
            return False, True
        if self._room(history.tokens) < 1:
            return True, True
        calls = self.request_token in turn and self.call_token in turn
        return False, model_turn and not calls

    @property
    def _policy(self) -> Any:
        """The model without accelerate's wrapper."""
        return extract_model_from_parallel(self.model)

    def _room(self, tokens: Tensor) -> int:
        """How many tokens may be added to those of an episode."""
        return min(self._context, self.max_length or UNLIMITED) - len(tokens)

    def _encode(self, text: str, special: bool) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids[0]
        return ids.to(self._policy.device, torch.long)

    def _generate_batched(self, query_tensors: list[Tensor], batch_size: int = 16) -> list[Tensor]:
        kwargs = dict(self.generation_kwargs)
        limits = new_token_limits(query_tensors, None, kwargs)
        rooms = [self._room(query) for query in query_tensors]
        own = kwargs.get("stop_strings") or ()
        own = (own,) if isinstance(own, str) else own
        kwargs["stop_strings"] = [self.call_token, self.submit_token, *own]
        settings = generation_settings(
            kwargs, tokenizer=self.tokenizer, policy=self._policy, temperature=1.0
        )
        limits = [min(limit, room) for limit, room in zip(limits, rooms, strict=True)]
        return sample_responses(
            self._policy, query_tensors, limits, settings, batch_size=batch_size
        )


def _by_name(tools: Mapping[str, Callable] | Sequence[Callable]) -> dict[str, Callable]:
    named = dict(tools) if isinstance(tools, Mapping) else {}
    for tool in () if isinstance(tools, Mapping) else tools:
        name = getattr(tool, "__name__", type(tool).__name__)
        if name in named or "<" in name:
            raise ValueError(
                f"no call can name the tool {name}: pass a dictionary with other names"
            )
        named[name] = tool
    return named
