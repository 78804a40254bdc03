"""The errors that a user can cause, each with the exit code that the command line gives it.

Everything else that is raised is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator

SECRET = (
    re.compile(  # by their shape: what services begin their keys with, and passwords in addresses
        r"(?P<before>://)[^/@\s]*:[^/@\s]+(?=@)"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
        r"|\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z]{20,}|gh[oprsu]_[A-Za-z0-9]{20,}"
        r"|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_]{20,}"
        r"|[rs]k_(?:live|test)_[A-Za-z0-9]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
        r"|xox[a-z]-[A-Za-z0-9-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|wandb_v\d_\w{20,}"
        r"|eyJ[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]*|[Bb]earer\s+[\w.~+/-]{16,}=*)"
    )
)


class PPOCliError(Exception):
    """The request is understood but could not be carried out (exit code 1).

    Its message repeats no secret that it was made with.
    """

    exit_code = 1

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class UsageError(PPOCliError, ValueError):
    """The request itself is wrong: an option, a configuration, a path, data (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that does not parse or does not validate."""


class DataError(UsageError):
    """A prompt source that is absent, unreadable or empty."""


class ModelNotFoundError(UsageError):
    """A model name or folder that names no model."""


class ModelError(PPOCliError):
    """A model that is there but cannot be loaded or used, or a hub that does not answer."""


class MissingPackageError(PPOCliError, ImportError):
    """A setting that needs a package which is not installed."""


class Interrupted(BaseException):
    """A signal that asks to stop at once; `number` is the signal's.

    No `Exception`, and no `KeyboardInterrupt`, which libraries catch as they like.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class DivergenceError(PPOCliError):
    """A training step that went wrong, so that going on from it makes no sense."""


class NumericalError(DivergenceError):
    """Numbers that stopped being finite during training."""


class UnsuitableModel(TypeError):
    """A fast way does not suit a model, or it does not take such inputs: another way is taken."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a processor of whatever kind: `error` or a cause of it says so."""
    told = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "bad allocation")
    return any(
        isinstance(cause, MemoryError)
        or getattr(cause, "errno", None) == errno.ENOMEM
        or any(words in str(cause).lower() for words in told)
        for cause in causes_of(error)
    )


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it was raised from or while handling, and so on."""
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
    """`text` with `***` in place of what has the shape of a password, token or key."""
    return SECRET.sub(lambda found: f"{found['before'] or ''}***", text)
