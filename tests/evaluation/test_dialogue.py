"""Prompts in turn: what the model reads each time, and what is shown while it answers."""

from __future__ import annotations

import pytest
import torch

from ppo_cli.cli import interactive
from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.errors import DataError
from ppo_cli.evaluation import dialogue
from ppo_cli.evaluation.dialogue import Dialogue
from ppo_cli.evaluation.generate import Source, load_model
from ppo_cli.models.sampling_params import SamplingParams
from tests.conftest import save_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model reads, special tokens included."""
    seen: list[str] = []
    sample = dialogue.sample_responses

    def spy(model: object, rows: list[torch.Tensor], *args: object) -> list[torch.Tensor]:
        seen.append(bytes(i for i in rows[0].tolist() if i < 256).decode("latin-1"))
        return sample(model, rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(dialogue, "sample_responses", spy)
    return seen


def start(folder: str, *, new: int = 4, **prompts: object) -> Dialogue:
    settings = PromptsConfig.model_validate({"cut": False, **prompts})
    chat = settings if settings.chat else None
    loaded = load_model(Source("m", folder), torch.device("cpu"), chat=chat)
    return Dialogue(loaded, settings, SamplingParams(), max_new_tokens=new, seed=0)


def test_a_conversation_goes_on_and_forgets_its_oldest_turns_when_it_is_full(
    folder: str, queries: list[str]
) -> None:
    talk = start(folder, chat=True, system="S")
    pieces: list[str] = []
    first = talk.answer("a" * 30, pieces.append)
    assert "".join(pieces).strip() == first.response.strip()
    assert first.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a" * 30},
    ]
    second = talk.answer("b" * 30, pieces.append)
    assert second.messages is not None
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[2]["content"] == first.response.strip()
    third = talk.answer("c" * 90, pieces.append)  # a context of 192 tokens
    assert third.messages is not None
    assert third.messages[0]["content"] == "S"
    assert third.messages[1]["content"][0] == "b" and len(queries[2]) < 192
    with pytest.raises(DataError, match="exceeds the context of m"):
        talk.answer("d" * 200, pieces.append)
    assert len(queries) == 3


def test_without_a_template_each_text_stands_alone(folder: str, queries: list[str]) -> None:
    talk = start(folder)
    for text in ("one", "two"):
        assert talk.answer(text, lambda _: None).messages is None
    assert [len(query) for query in queries] == [3, 3]


def test_pieces_are_shown_as_text_with_their_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    interactive._write("a\x1b[31m\nb\u202e")
    assert capsys.readouterr().out == "a\\x1b[31m\nb\\u202e"


class Terminal:
    """Standard input of a person."""

    def isatty(self) -> bool:
        return True


def test_a_person_ends_a_response_or_the_session(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["stop", "Hi", EOFError, KeyboardInterrupt])

    def line(_: str) -> str:
        given = next(typed)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(interactive.sys, "stdin", Terminal())
    talk = start(folder, chat=True)
    answer = talk.answer

    def interrupted(text: str, write: dialogue.Write) -> object:
        if text == "stop":
            raise KeyboardInterrupt
        return answer(text, write)

    monkeypatch.setattr(talk, "answer", interrupted)
    assert interactive.converse(talk, None, is_chat=True) == 0
    shown = capsys.readouterr()
    assert "one conversation" in shown.err and "stopped" in shown.err
    assert interactive.converse(talk, None, is_chat=True) == 130
