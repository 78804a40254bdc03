"""`ppo-cli generate --interactive`: prompts from the terminal or standard input, one a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ppo_cli.cli.console import note
from ppo_cli.errors import DataError, PPOCliError
from ppo_cli.utils.text import escape_controls

if TYPE_CHECKING:
    from ppo_cli.evaluation.dialogue import Dialogue

PROMPT = "> "
INTERRUPTED = 130


def converse(dialogue: Dialogue, label: str | None, *, is_chat: bool) -> int:
    """Answer each line until the input ends; return the exit code.

    Ctrl-C ends a response that is being written, and the session where none is.

    Args:
        dialogue: answers.
        label: what the scores are of; None for no scores.
        is_chat: whether the lines are one conversation.
    """
    if sys.stdin.isatty():
        what = "one conversation" if is_chat else "each prompt on its own"
        note(f"{what}; Ctrl-C stops a response, Ctrl-D ends")
    lines = _lines()
    while True:
        try:
            line = next(lines, None)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            return INTERRUPTED
        if line is None:
            return 0
        _answer(dialogue, line, label)


def _answer(dialogue: Dialogue, line: str, label: str | None) -> None:
    try:
        sample = dialogue.answer(line, _write)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        _write("\n")
        note("stopped; this response is not part of the conversation")
        return
    except PPOCliError as error:
        if not sys.stdin.isatty():
            raise
        note(f"error: {error}")
        return
    _write("\n")
    if label is not None and sample.score is not None:
        note(f"score {sample.score:.2f}, P({label}) {sample.probability:.2f}")


def _write(text: str) -> None:
    """Show a piece of text from a model, its line ends kept."""
    sys.stdout.write(escape_controls(text, keep_lines=True))
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """The lines that are not blank.

    Raises:
        DataError: standard input is not UTF-8.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  # `input` edits lines with it
    while True:
        try:
            if is_terminal:
                line = input(PROMPT)
            elif not (line := sys.stdin.readline()):
                return
        except EOFError:
            sys.stderr.write("\n")
            return
        except UnicodeDecodeError as error:
            raise DataError(
                "standard input is not UTF-8: convert it, with iconv for example"
            ) from error
        if line.strip():
            yield line.rstrip("\r\n")
