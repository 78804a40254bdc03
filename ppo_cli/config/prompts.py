"""The `prompts` section: where prompts come from, and how queries are made of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ppo_cli.config.section import MAX_COUNT, Length, Name, Section, check_order
from ppo_cli.utils.text import shortened

MAX_TEMPLATE = 200_000  # characters
Value = str | int | float | bool | None
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
SystemText = Annotated[str, Field(min_length=1, max_length=100_000)]


def read_template(given: str) -> str:
    """A chat template: `given` itself where it is one, else the text of the file that it names.

    Raises:
        ValueError: there is no such file, or it holds no template.
    """
    text, file = given, None
    if "{" not in given:
        file = Path(given).expanduser()
        if not os.path.isfile(file):
            raise ValueError(
                f"{shortened(given, 60)!r} is neither a file nor a Jinja template: give one of them"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{given} cannot be read as UTF-8 text: {error}") from error
    if "{" not in text or len(text) > MAX_TEMPLATE:
        raise ValueError(
            f"{file or 'the text'} is no chat template: Jinja of at most {MAX_TEMPLATE} characters "
            "is needed"
        )
    return text


class PromptSource(Section):
    """One source of prompts: its place, columns and filters."""

    source: Name = "embedded"
    """`embedded`; a .csv, .tsv, .json, .jsonl, .parquet, .arrow or .txt file, also as .gz or .zip;
    the https address of one; a pattern such as data/*.jsonl; a folder; or the hub id of a
    dataset."""
    revision: Name | None = None
    """Branch, tag or commit of a hub dataset. A resumed run loads the same commit again."""
    subset: Name | None = None
    """Configuration of a hub dataset or a folder."""
    split: Name = "train"
    """Split of a hub dataset or a folder."""
    held_out_split: Name | None = None
    """Split of the held-out prompts; null takes them from `split`."""
    held_out_source: Name | None = None
    """Source of the held-out prompts; null takes them from `source`."""
    streaming: bool = False
    """Read a hub dataset from its beginning, up to `limit`, without downloading all of it."""
    shuffle_buffer: Count = 1000
    """With `streaming`: number of rows that are shuffled together; 0 keeps their order."""
    text_column: Name = "text"
    """Column of the texts or conversations. Rows without text are left out. Where there is no
    column `text`, a column `messages`, `conversations` or `prompt` takes its place."""
    chat: bool = False
    """The queries are conversations in the form of the tokenizer's chat template. A text is a
    user's message; a list of messages (role and content, or from and value) is a conversation."""
    system: SystemText | None = None
    """With `chat`: system prompt of every conversation that has none."""
    system_column: Name | None = None
    """With `chat`: column of the system prompts."""
    min_characters: Count = 0
    """Use only texts longer than this. The length of a conversation is that of its contents."""
    max_characters: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Use only texts of at most this many characters; null for no limit."""
    where: dict[Name, Value | list[Value]] = {}
    """Use only rows with this value, or one of these values, in each of these columns: {label: 1},
    {language: [en, de]}. A label of a hub dataset may be given by its name."""
    keep_columns: list[Name] | None = None
    """Other columns to keep for rewards; null for all, [] for none."""

    @model_validator(mode="after")
    def _consistent(self) -> PromptSource:
        if self.max_characters is not None:
            check_order(self, "min_characters", "max_characters")
        for key in ("system", "system_column"):
            if getattr(self, key) is not None and not self.chat:
                raise ValueError(f"{key} is for conversations: set chat to true, or {key} to null")
        return self


class WeightedSource(PromptSource):
    """One of several sources."""

    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of this source among the prompts, relative to the other weights."""


class PromptsConfig(PromptSource):
    """The prompts: texts or conversations, and the queries that are made of them."""

    sources: Annotated[list[WeightedSource], Field(min_length=1, max_length=100)] | None = None
    """Several sources instead of one: a list of sections with the keys above and `weight`."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Use at most this many texts."""
    cut: bool = True
    """Cut texts to their first tokens; false uses whole texts. Conversations are never cut so."""
    input_min_text_length: Length = 2
    """With `cut`: shortest query, tokens."""
    input_max_text_length: Length = 8
    """With `cut`: queries are shorter than this (tokens), as with TRL's LengthSampler."""
    max_tokens: Length | None = None
    """Longest query, tokens; null for no limit."""
    too_long: Literal["drop", "truncate_left"] = "drop"
    """What to do with queries longer than `max_tokens`: leave them out, or leave out their
    beginning. A conversation loses its oldest turns and keeps its system prompt."""
    chat_template: Annotated[str, AfterValidator(read_template)] | None = None
    """With `chat`: a Jinja template or a file of one; null for the tokenizer's own. It is saved
    with the model."""
    chat_template_kwargs: dict[Name, Any] = {}
    """With `chat`: variables of the chat template, such as {enable_thinking: false}."""
    held_out: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Number of texts kept for evaluation, not used for training."""

    @model_validator(mode="after")
    def _ordered(self) -> PromptsConfig:
        check_order(self, "input_min_text_length", "input_max_text_length")
        own = [k for k, f in PromptSource.model_fields.items() if getattr(self, k) != f.default]
        if self.sources is not None and own:
            raise ValueError(
                f"{own[0]} stands beside sources, where it has no effect: give it in each source"
            )
        if self.limit is None and any(source.streaming for source in self.mixture):
            raise ValueError("streaming reads up to limit: set prompts.limit, to 10000 for example")
        for key, default in (("chat_template", None), ("chat_template_kwargs", {})):
            if getattr(self, key) != default and not self.has_chat:
                raise ValueError(f"{key} is for conversations: set chat to true, or leave it out")
        return self

    @property
    def mixture(self) -> list[WeightedSource]:
        """The sources, one or several."""
        if self.sources is not None:
            return self.sources
        return [WeightedSource(**{key: getattr(self, key) for key in PromptSource.model_fields})]

    @property
    def has_chat(self) -> bool:
        """Whether some prompts are conversations."""
        return any(source.chat for source in self.mixture)

    @property
    def name(self) -> str:
        """The source, or all of them, for messages."""
        return ", ".join(source.source for source in self.mixture)
