"""Errors that a user can cause, each with its exit code on the command line.

Any other exception is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator

SECRET = re.compile(  # prefixes of the keys of services, and passwords in addresses
    r"(?P<before>://)[^/@\s]*:[^/@\s]+(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z]{20,}|gh[oprsu]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_]{20,}"
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|wandb_v\d_\w{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]*|[Bb]earer\s+[\w.~+/-]{16,}=*)"
)


class PPOCliError(Exception):
    """The request could not be carried out (exit code 1).

    Secrets in its message are replaced by `***`.
    """

    exit_code = 1

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class UsageError(PPOCliError, ValueError):
    """The request is wrong: an option, a configuration, a path, data (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration cannot be parsed or is not valid."""


class DataError(UsageError):
    """A source of prompts is absent, unreadable or empty."""


class ConsentError(UsageError):
    """A reward runs code, or asks a server, that the user has not named."""


class ModelNotFoundError(UsageError):
    """A name or folder is not that of a model."""


class ModelError(PPOCliError):
    """A model cannot be loaded or used, or the hub does not answer."""


class MissingPackageError(PPOCliError, ImportError):
    """A setting needs a package that is not installed (exit code 2)."""

    exit_code = 2


class Interrupted(BaseException):
    """A signal asks to stop at once; `number` is its number.

    It is neither an `Exception` nor a `KeyboardInterrupt`, because libraries catch those.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class DivergenceError(PPOCliError):
    """A training step failed, so that training cannot go on from it."""


class NumericalError(DivergenceError):
    """Numbers are no longer finite during training."""


class UnsuitableModel(TypeError):
    """A fast path does not support a model or its inputs; the caller takes another path."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or a cause of it, says that memory ran out, on any kind of device."""
    phrases = (
        "out of memory",
        "allocate memory",
        "not enough memory",
        "bad_alloc",
        "bad allocation",
    )
    return any(
        isinstance(cause, MemoryError)
        or getattr(cause, "errno", None) == errno.ENOMEM
        or any(words in str(cause).lower() for words in phrases)
        for cause in causes_of(error)
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether `error`, or a cause of it, is how gloo or NCCL say that another process is gone."""
    phrases = (
        "gloo/transport",  # the place in its source that every such message of gloo begins with
        "closed by peer",
        "reset by peer",
        "timed out waiting",
        "socket has timed out",
        "wait timeout",
        "remote process exited",
        "communicator was aborted",
        "collective operation timeout",
    )
    return any(
        isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in phrases)
        for cause in causes_of(error)
    )


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, then the chain of its causes and contexts."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`, or an empty string."""
    by_lower = {item.lower(): item for item in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean '{by_lower[nearest[0]]}'?" if nearest else ""


def without_secrets(text: str) -> str:
    """Replace passwords, tokens and keys, recognised by their form, by `***`."""
    return SECRET.sub(lambda found: f"{found['before'] or ''}***", text)
