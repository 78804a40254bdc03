"""Loading by folder or hub id: what it raises, turned into one message that names the thing."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
import warnings
from collections.abc import Collection, Iterator
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
from ppo_cli.utils.files import is_inside, refuse_stream
from ppo_cli.utils.text import shortened

MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
WAITS = (1, 2, 4)  # seconds between questions to a hub that does not answer
TIMEOUT = 10  # seconds for each answer
LONGEST_WAIT = 30  # seconds that the hub may have its client sleep


@contextmanager
def loading_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Around a call that loads `name`.

    Args:
        name: folder or hub id.
        kind: what it should be, for the message: "model", "classifier", "dataset".

    Raises:
        ModelNotFoundError: no such folder, a folder that holds no model, no such hub repository.
        ModelError: the hub does not answer or refuses, or the files cannot be read.
    """
    if kind != "dataset":
        _check_folder(name)
    answers = True
    try:
        if not is_path(name):
            _given_up.clear()
            _bound_retries()
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
    """Around the first use of what was loaded: files that can be read may yet make no sense.

    Args:
        name: folder or hub id.
        kind: what it should be, for the message: "model", "classifier".

    Raises:
        ModelError: it does not work.
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
    """Around peft's adding an adapter to `model`.

    Raises:
        UsageError: it refuses, mostly for modules that the model does not have.
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


def is_path(name: str) -> bool:
    """Whether `name` can only be a path, not a hub id."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def refuse_missing(name: str, missing: Collection[str]) -> None:
    """Raise `ModelError` where weights are `missing`: they would be random numbers."""
    if missing:
        names = ", ".join(sorted(missing)[:5]) + (" ..." if len(missing) > 5 else "")
        raise ModelError(
            f"{name}: its weights lack {names}, which would be random numbers: save the "
            "whole model, or give another"
        )


def refuse_misshaped(name: str, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Raise `ModelError` where weights have other shapes than the configuration gives them.

    Args:
        name: of the model.
        mismatched: tensor, its shape in the file, and in the model; each.
    """
    if mismatched:
        shown = [f"{key} is {tuple(file)}, not {tuple(model)}" for key, file, model in mismatched]
        names = "; ".join(sorted(shown)[:3]) + (" ..." if len(shown) > 3 else "")
        raise ModelError(
            f"{name}: its weights do not fit its config.json: {names}. Put the config.json back "
            "that belongs to them, or save the whole model anew"
        )


def refuse_empty(name: str, tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer without words, which is made where none is found."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{name} holds no tokenizer: save one beside the model (tokenizer.json)")


def refuse_unusable(name: str, tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer whose files hold values that it cannot work with."""
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, (int, float)) or length != length:
        raise ModelError(
            f"{name}: model_max_length in its tokenizer_config.json is {str(length)[:40]!r}, which "
            "is no number: put one there, or leave the key out"
        )
    try:
        tokenizer("a", truncation=True, max_length=1)
    except Exception as error:
        raise ModelError(
            f"{name}: its tokenizer does not work ({first_line(error)}): mend "
            "tokenizer_config.json, or save the tokenizer anew"
        ) from error


def refuse_nan(name: str, model: Any) -> None:
    """Raise `ModelError` for weights that are no numbers: whatever is computed with them is none.

    Args:
        name: of the model.
        model: a `torch.nn.Module`; weights of other classes than torch's own are not looked at.
    """
    for key, weight in model.named_parameters():
        plain = type(weight.data).__name__ == "Tensor" and not weight.is_meta
        if not plain or not weight.is_floating_point() or weight.data.sum().isfinite():
            continue
        if weight.data.isnan().any():  # asked second, as it takes longer than a sum
            raise ModelError(
                f"{name}: its weights are damaged: {key.removeprefix('pretrained_model.')} holds "
                "NaN. Give another copy of the model"
            )


def _check_folder(name: str) -> None:
    folder = Path(name)
    if not is_path(name):
        return
    if not os.path.exists(name):
        raise ModelNotFoundError(
            f"{name}: no such folder; give a run directory, another model folder, or a hub id"
        )
    if not folder.is_dir():
        raise ModelNotFoundError(f"{name} is a file: give the folder of a model, or a hub id")
    _check_files(folder)
    if any((folder / file).is_file() for file in MODEL_FILES):
        if (base := adapter_base(name)) and os.path.isdir(base):
            _check_files(Path(base))
        return
    if (folder / "run.yaml").is_file():
        raise ModelNotFoundError(
            f"{name} holds no model yet: its run has not ended, and checkpoints are for --resume "
            f"alone. End it with: ppo-cli train --output {shlex.quote(name)} --resume"
        )
    if (folder / "manifest.json").is_file() and folder.name.startswith("step-"):
        raise ModelNotFoundError(
            f"{name} is a checkpoint, from which a run is resumed, and no model: give the run "
            "directory"
        )
    raise ModelNotFoundError(
        f"{name} holds no model (no config.json): give a run directory, or a folder that "
        "transformers' save_pretrained wrote"
    )


def adapter_base(name: str) -> str | None:
    """The model that an adapter in the folder `name` belongs to; None where no adapter is there."""
    base = _read_object(Path(name) / "adapter_config.json").get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _check_files(folder: Path) -> None:
    """Check what is read of a model's folder.

    Raises:
        UsageError: a device, pipe or socket is among it.
        ModelError: a file names others outside of the folder, or it cannot be read.
    """
    try:
        files = [*folder.iterdir()]
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror or error}") from error
    for file in files:
        refuse_stream(file)
    configs = folder / "config.json", folder / "tokenizer_config.json"
    for file in (*folder.glob("*.index.json"), *configs):
        content = _read_object(file)
        shards, tokenizers = content.get("weight_map"), content.get("fast_tokenizer_files")
        named = [content.get("transformers_weights")]
        named += shards.values() if isinstance(shards, dict) else ()
        named += tokenizers if isinstance(tokenizers, list) else ()
        for other in {name for name in named if isinstance(name, str)}:
            if not is_inside(other):
                raise ModelError(
                    f"{file} names {shortened(other, 60)}, which is outside of the folder and is "
                    "not read: copy it there, or give another model"
                )
            refuse_stream(folder / other)


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none: loading says best what is wrong."""
    try:
        content = json.loads(file.read_bytes()) if os.path.isfile(file) else None
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


@lru_cache(maxsize=64)
def _ask_hub(name: str, kind: str) -> bool:
    """Ask whether `name` is there, a few times until the hub answers; whether it did.

    False says that it does not, and that `name` is in the cache.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_OFFLINE:
        return True  # the client itself refuses to ask
    for wait in (*WAITS, None):
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
        except Exception as error:
            status = _status(error)
            if status == HTTPStatus.NOT_FOUND:
                raise
            if not (_is_of_network(error) if status is None else _is_passing(status)):
                return True  # loading it says best what is wrong
            folder = repo_folder_name(repo_id=name, repo_type=kind)
            if Path(constants.HF_HUB_CACHE, folder, "snapshots").is_dir():
                return False
            if wait is None:
                raise
            time.sleep(wait)
        else:
            break
    return True


@contextmanager
def _cache_alone(name: str) -> Iterator[None]:
    """Keep the hub's client from asking: it would do so again and again, for minutes in all."""
    from huggingface_hub import constants

    warnings.warn(f"the hub does not answer: {name} is taken from the cache", stacklevel=2)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


class _Unavailable(Exception):
    """The hub's answers are of no use, and more of the same is to be expected."""


_unanswered: list[str] = []
"""The address last asked for, as often as it was asked without success."""
_given_up: list[_Unavailable] = []
"""What was raised; transformers takes some errors for a file that is not there, and goes on."""


def _bound_retries() -> None:
    """Have the hub's client raise `_Unavailable` where it would go on asking, or sleep for long."""
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
    told = f"{response.headers.get('ratelimit', '')};t={response.headers.get('retry-after', '')}"
    seconds = max((int(number) for number in re.findall(r"\bt=(\d{1,9})", told)), default=0)
    if seconds > LONGEST_WAIT:
        problem = f"the hub asks to wait {seconds} s: try again then; with HF_TOKEN it allows more"
    elif len(_unanswered) > len(WAITS):
        problem = _answer(status)
    else:
        return
    _given_up.append(_Unavailable(problem))
    raise _given_up[-1]


def _is_passing(status: int) -> bool:
    """Whether an answer of the hub may be another one in a moment."""
    return status in (408, 429) or status >= 500


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_of_network(error: BaseException) -> bool:
    # The hub's client library has changed its name between releases: httpx, httpx2.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        "httpx"
    )


def _translated(name: str, kind: str, error: Exception) -> PPOCliError:
    from huggingface_hub import errors as hub

    # transformers and datasets wrap the hub's own errors; the first cause says what happened.
    causes = list(causes_of(error))

    def caused_by(*types: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, types)), None)

    base = _base_of_adapter(name)
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
    if no_tokenizer and not any(map(_is_of_network, causes)):
        return ModelError(f"{name} holds no tokenizer that can be read: save one beside the model")
    if (absent := caused_by(ImportError)) is not None:
        return ModelError(_lacks_package(name, absent))
    if is_path(name):
        return ModelError(_unloadable(name, kind, error))
    if caused_by(hub.RevisionNotFoundError):
        return ModelNotFoundError(f"{name}: the hub has no such revision of it: check its name")
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError) or any(
        _status(cause) == HTTPStatus.NOT_FOUND for cause in causes
    ):
        place = "file" if kind == "dataset" else "folder"
        return ModelNotFoundError(
            f"{name}: neither a {place} here nor a {kind} on the hub (a private one needs HF_TOKEN)"
        )
    if caused_by(hub.OfflineModeIsEnabled):
        return ModelError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it"
        )
    if statuses := [status for cause in causes if (status := _status(cause))]:
        return ModelError(f"{name}: {_answer(statuses[0])}")
    if any(type(cause).__name__ in ("RemoteProtocolError", "ReadError") for cause in causes):
        return ModelError(
            f"{name}: the download breaks off, also when tried again; check the network and run "
            "this again, it goes on with what has come"
        )
    if caused_by(hub.LocalEntryNotFoundError) or any(map(_is_of_network, causes)):
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
    base = _base_of_adapter(name)
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


def _base_of_adapter(name: str) -> str | None:
    """The base model of an adapter's folder, as its files name it; None for anything else."""
    try:
        about = json.loads(Path(name, "adapter_config.json").read_text(encoding="utf-8"))
        return str(about["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _answer(status: int) -> str:
    """What a hub's answer means, and what to do."""
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown"
    remedy = "try again later" if _is_passing(status) else "check HF_TOKEN"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        remedy = "try again in a few minutes; with HF_TOKEN set its limits are higher"
    return f"the hub answers {status} ({phrase}), also when asked again: {remedy}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 300 characters.

    With the next one where it ends in a colon.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told[:300]


IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def implementations(name: str, config: Any, is_trusted: bool) -> dict[str, Any]:
    """Keywords for `from_pretrained` that decide about code a configuration names elsewhere.

    A configuration may name a kernel on the hub, `owner/name`, which transformers would fetch and
    run, or a package's that is not here. Without consent transformers' own code takes its place;
    a warning says so.

    Args:
        name: the model's.
        config: its transformers configuration.
        is_trusted: whether code that it names may run.
    """
    keywords: dict[str, Any] = {}
    for key in IMPLEMENTATIONS:
        elsewhere = [value for value in _all_values(config, f"_{key}") if _is_elsewhere(value)]
        if not elsewhere:
            continue
        if is_trusted and "/" in elsewhere[0]:
            keywords["allow_all_kernels"] = True
            continue
        consent = f"; to run it, read it and give --trust-remote-code {name}"
        warnings.warn(
            f"{name}: {key} {elsewhere[0]!r} in its config.json names code that it does not hold: "
            f"transformers' own takes its place{consent if '/' in elsewhere[0] else ''}",
            stacklevel=3,
        )
        setattr(config, f"_{key}", None)  # with the configurations inside it
        keywords["config"] = config
    return keywords


def _all_values(config: Any, key: str) -> Iterator[str]:
    """What a configuration and the configurations inside it have under `key`, if it is text."""
    if isinstance(value := getattr(config, key, None), str):
        yield value
    for inner in getattr(config, "sub_configs", {}):
        if (section := getattr(config, inner, None)) is not None:
            yield from _all_values(section, key)


def _is_elsewhere(implementation: str) -> bool:
    """Whether an implementation is neither transformers' own nor an installed package's."""
    from transformers import utils

    flash = re.search(r"flash_attention_(\d)$", implementation)
    available = flash and getattr(utils, f"is_flash_attn_{flash[1]}_available", None)
    return "/" in implementation or bool(flash and not (available and available()))
