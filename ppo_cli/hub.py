"""Loading by folder or hub id: what it raises, turned into one message that names the thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppo_cli.errors import ModelError, ModelNotFoundError, PPOCliError

MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")


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
    try:
        yield
    except (PPOCliError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        raise _translated(name, kind, error) from error


def is_path(name: str) -> bool:
    """Whether `name` can only be a path, not a hub id."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_folder(name: str) -> None:
    folder = Path(name)
    if not is_path(name):
        return
    if not folder.exists():
        raise ModelNotFoundError(
            f"{name}: no such folder; give a run directory, another model folder, or a hub id"
        )
    if not folder.is_dir():
        raise ModelNotFoundError(f"{name} is a file: give the folder of a model, or a hub id")
    if not any((folder / file).is_file() for file in MODEL_FILES):
        raise ModelNotFoundError(
            f"{name} holds no model (no config.json): give a run directory, or a folder that "
            "transformers' save_pretrained wrote"
        )


def _translated(name: str, kind: str, error: Exception) -> PPOCliError:
    from huggingface_hub import errors as hub

    # transformers and datasets wrap the hub's own errors; the first cause says what happened.
    causes = list(_causes(error))

    def caused_by(*types: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, types)), None)

    if caused_by(hub.GatedRepoError):
        return ModelError(f"{name}: the hub asks for access; request it there, then set HF_TOKEN")
    if is_path(name):
        return ModelError(f"{name} cannot be loaded as a {kind}: {first_line(error)}")
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
        return ModelNotFoundError(
            f"{name}: neither a folder here nor a {kind} on the hub (a private one needs HF_TOKEN)"
        )
    if caused_by(hub.OfflineModeIsEnabled):
        return ModelError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it"
        )
    if answer := caused_by(hub.HfHubHTTPError):
        return ModelError(f"{name}: the hub answers with an error ({first_line(answer)})")
    unreachable = caused_by(ConnectionError, TimeoutError, hub.LocalEntryNotFoundError)
    # The hub's client library has changed its name between releases: httpx, httpx2.
    if unreachable or any(type(cause).__module__.startswith("httpx") for cause in causes):
        return ModelError(
            f"{name}: no such folder here, and the hub cannot be reached to fetch it as a {kind}; "
            "check the name and the network, or give a local folder"
        )
    return ModelError(f"{name} cannot be loaded as a {kind}: {first_line(error)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
