"""Loading by folder or hub id: asking the hub, and turning errors into one message."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ppo_cli.errors import (
    ModelError,
    ModelNotFoundError,
    PPOCliError,
    UsageError,
    causes_of,
    is_out_of_memory,
)
from ppo_cli.utils.model_folder import adapter_base, check_folder, is_path

WAITS = (1, 2, 4)  # seconds between requests to a hub that does not answer
TIMEOUT = 10  # seconds per request
MAX_WAIT = 30  # seconds; the hub may ask its client to wait for longer


@contextmanager
def loading_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Around a call that loads `name`.

    Args:
        name: folder or hub id.
        kind: for the message: "model", "classifier" or "dataset".

    Raises:
        ModelNotFoundError: no such folder, a folder that holds no model, no such hub repository.
        ModelError: the hub does not answer or refuses, or the files cannot be read.
    """
    if kind != "dataset":
        check_folder(name)
    answers = True
    try:
        if not is_path(name):
            _given_up.clear()
            bound_retries()
            answers = _ask_hub(name, "dataset" if kind == "dataset" else "model")
        with nullcontext() if answers else _cache_alone(name):
            yield
    except PPOCliError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(name, kind) from error
        if not answers:
            raise ModelError(
                f"{name}: the hub does not answer, and the cache does not hold all of it: check "
                "the network, or give a local folder"
            ) from error
        raise _translated(name, kind, error) from error


@contextmanager
def trial_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Around the first use of a model: files that can be read may hold wrong values.

    Args:
        name: folder or hub id.
        kind: for the message: "model" or "classifier".

    Raises:
        ModelError: the model does not work.
    """
    try:
        yield
    except PPOCliError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(name, kind) from error
        raise ModelError(
            f"{name} does not work as a {kind} ({first_line(error).rstrip('. ')}): look for a "
            "wrong value in its config.json, or give another"
        ) from error


@contextmanager
def adapter_errors(model: Any) -> Iterator[None]:
    """Around adding an adapter to `model` with peft.

    Raises:
        UsageError: peft refuses, mostly because the model lacks a module.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        weights = (
            (name, getattr(module, "weight", None)) for name, module in model.named_modules()
        )
        names = {name.rpartition(".")[2] for name, w in weights if w is not None and w.ndim == 2}
        raise UsageError(
            f"the adapter does not fit the model: {first_line(error).partition('. ')[0]}. Name "
            "modules of the model in target_modules (policy.adapter.target_modules), of "
            f"{', '.join(sorted(names)[:20])}"
        ) from error


@lru_cache(maxsize=64)
def _ask_hub(name: str, kind: str) -> bool:
    """Ask the hub for `name`, a few times; return whether it answers.

    False means that it does not answer and that `name` is in the cache.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_OFFLINE:
        return True  # the client itself refuses to ask
    for wait in (*WAITS, None):
        try:
            info: Any = HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
            _licenses[name] = getattr(info.card_data, "license", None)
        except Exception as error:
            status = status_of(error)
            if status == HTTPStatus.NOT_FOUND:
                raise
            if not (is_of_network(error) if status is None else _is_passing(status)):
                return True  # loading gives the better message
            folder = repo_folder_name(repo_id=name, repo_type=kind)
            if Path(constants.HF_HUB_CACHE, folder, "snapshots").is_dir():
                return False
            if wait is None:
                raise
            time.sleep(wait)
        else:
            break
    return True


_licenses: dict[str, Any] = {}
"""Hub id -> the license in its card, of what the hub was asked for."""


def license_of(name: str | None, folder: str | None = None) -> str | None:
    """The license of a model, if its card names one.

    Args:
        name: on the hub; known if the hub was asked for it in this process.
        folder: of the model, if it is local.
    """
    from huggingface_hub import ModelCard

    found = _licenses.get(name) if name is not None else None
    card = Path(folder or "", "README.md")
    if name is None and folder is not None and card.is_file():
        try:
            found = ModelCard.load(card, ignore_metadata_errors=True).data.license
        except Exception:  # a card that cannot be read names no license
            return None
    return found if isinstance(found, str) else None


def ask_license(name: str) -> str | None:
    """The license of a model on the hub; None where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, timeout=TIMEOUT)
    except Exception:  # a license is left out rather than guessed
        return None
    _licenses[name] = getattr(info.card_data, "license", None)
    return license_of(name)


@contextmanager
def _cache_alone(name: str) -> Iterator[None]:
    """Keep the hub's client from asking again and again, for minutes in all."""
    from huggingface_hub import constants

    warnings.warn(f"the hub does not answer: {name} is taken from the cache", stacklevel=2)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


class _Unavailable(Exception):
    """The hub does not give a useful answer and will not soon."""


_unanswered: list[str] = []
"""The newest address, once for each request without success."""
_given_up: list[_Unavailable] = []
"""The raised errors: transformers treats some as a missing file and goes on."""


def bound_retries() -> None:
    """Make the hub's client raise `_Unavailable` instead of retrying or waiting for long."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    if _check_answer not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [*hooks["response"], _check_answer]}


def _check_answer(response: Any) -> None:
    status, address = response.status_code, str(response.request.url)
    if address not in _unanswered or not _is_passing(status):
        _unanswered.clear()
    if not _is_passing(status):
        return
    _unanswered.append(address)
    limits = f"{response.headers.get('ratelimit', '')};t={response.headers.get('retry-after', '')}"
    seconds = max((int(number) for number in re.findall(r"\bt=(\d{1,9})", limits)), default=0)
    if seconds > MAX_WAIT:
        problem = f"the hub asks to wait {seconds} s: try again then; with HF_TOKEN it allows more"
    elif len(_unanswered) > len(WAITS):
        problem = _answer(status)
    else:
        return
    _given_up.append(_Unavailable(problem))
    raise _given_up[-1]


def _is_passing(status: int) -> bool:
    """Whether another request may soon get another answer."""
    return status in (408, 429) or status >= 500


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of the hub's client; None where the hub did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_of_network(error: BaseException) -> bool:
    """Whether an error says that the hub cannot be reached."""
    # The HTTP library of the hub's client is httpx or httpx2, by its release.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        "httpx"
    )


def _translated(name: str, kind: str, error: Exception) -> PPOCliError:
    from huggingface_hub import errors as hub

    # transformers and datasets wrap the hub's errors; the causes say what happened.
    causes = list(causes_of(error))

    def caused_by(*types: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, types)), None)

    base = adapter_base(name)
    if "trust_remote_code" in str(error):
        if base is not None and base in str(error):
            return ModelError(
                f"{name} is an adapter of {base}, which needs code that it brings along: that is "
                "not run for an adapter. Merge the two with peft's merge_and_unload, save them as "
                "one folder, read its code, and give that folder, with --trust-remote-code for it"
            )
        return ModelError(
            f"{name} needs code that it brings along, which is not run: read it, and if you trust "
            f"it, give --trust-remote-code {name}"
        )
    if caused_by(hub.GatedRepoError):
        return ModelError(f"{name}: the hub asks for access; request it there, then set HF_TOKEN")
    if not is_path(name) and _given_up:
        return ModelError(f"{name}: {_given_up[-1]}")
    no_tokenizer = "the backend tokenizer" in str(error)
    if no_tokenizer and not any(map(is_of_network, causes)):
        return ModelError(f"{name} holds no tokenizer that can be read: save one beside the model")
    if (absent := caused_by(ImportError)) is not None:
        return ModelError(_lacks_package(name, absent))
    if is_path(name):
        return ModelError(_unloadable(name, kind, error))
    if caused_by(hub.RevisionNotFoundError):
        return ModelNotFoundError(f"{name}: the hub has no such revision of it: check its name")
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError) or any(
        status_of(cause) == HTTPStatus.NOT_FOUND for cause in causes
    ):
        place = "file" if kind == "dataset" else "folder"
        return ModelNotFoundError(
            f"{name}: neither a {place} here nor a {kind} on the hub (a private one needs HF_TOKEN)"
        )
    if caused_by(hub.OfflineModeIsEnabled):
        return ModelError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it"
        )
    if statuses := [status for cause in causes if (status := status_of(cause))]:
        return ModelError(f"{name}: {_answer(statuses[0])}")
    if any(type(cause).__name__ in ("RemoteProtocolError", "ReadError") for cause in causes):
        return ModelError(
            f"{name}: the download breaks off, also when tried again; check the network and run "
            "this again, it goes on with what has come"
        )
    if caused_by(hub.LocalEntryNotFoundError) or any(map(is_of_network, causes)):
        return ModelError(
            f"{name}: no such folder here, and the hub cannot be reached to fetch it as a {kind}; "
            "check the name and the network, or give a local folder"
        )
    return ModelError(_unloadable(name, kind, error))


def _out_of_memory(name: str, kind: str) -> ModelError:
    return ModelError(
        f"{name}: out of memory while it was loaded as a {kind}: end other programs, use a larger "
        f"machine, or give a smaller {kind}"
    )


def _unloadable(name: str, kind: str, error: Exception) -> str:
    problem = first_line(error).rstrip(". ")
    remedy = "" if kind == "dataset" else "; save it anew with save_pretrained, or give another"
    if "ignore_mismatched_sizes" in problem:
        problem = "its weights have other shapes than its config.json gives them"
    base = adapter_base(name)
    adapter = f", an adapter of {base}," if base else ""
    return f"{name}{adapter} cannot be loaded as a {kind}: {problem}{remedy}"


def _lacks_package(name: str, error: BaseException) -> str:
    problem = first_line(error).rstrip(". ")
    if "kernels" in problem:
        return (
            f"{name} asks for code that the package kernels, which is not installed here, fetches "
            "from the hub and runs: give a model that does without (its attn_implementation is "
            "left out unless --trust-remote-code names it)"
        )
    return f"{name} needs a package that is not installed here: {problem}"


def _answer(status: int) -> str:
    """Message for an HTTP status of the hub, with what to do."""
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown"
    remedy = "try again later" if _is_passing(status) else "check HF_TOKEN"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        remedy = "try again in a few minutes; with HF_TOKEN set its limits are higher"
    return f"the hub answers {status} ({phrase}), also when asked again: {remedy}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters.

    A line that ends in a colon is joined with the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line[:300]
