"""Uploading files to a model repository on the hub, with one message for each thing that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ppo_cli.errors import ModelError, PPOCliError, UsageError, causes_of
from ppo_cli.utils.hub import bound_retries, first_line, is_of_network, status_of

REPO_ID = re.compile(r"[A-Za-z0-9][\w-]*/\w[\w.-]*")
BLANK = {".gitattributes"}  # files that the hub itself puts into a new repository


def check_repo_id(repo_id: str) -> None:
    """Raise `UsageError` unless `repo_id` has the form OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        is_valid = REPO_ID.fullmatch(repo_id) is not None
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UsageError(
            f"'{repo_id}' is no name of a repository on the hub: give OWNER/NAME, of letters, "
            "digits, '-', '_' and '.'"
        )


def check_token() -> None:
    """Raise `UsageError` where there is no token to upload with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UsageError(
            "uploading needs a token of the hub with the right to write: set HF_TOKEN, or run "
            "'hf auth login'"
        )


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    revision: str | None = None,
    private: bool = False,
    update: bool = False,
) -> str:
    """Upload files to a repository in one commit, and return the address of the repository.

    Args:
        repo_id: OWNER/NAME.
        files: path in the repository -> file, or content.
        message: of the commit.
        revision: branch; it is made if there is none of that name. None for the main one.
        private: make a private repository.
        update: add the commit to a repository that exists and has files.

    Raises:
        UsageError: no token, or the repository exists.
        ModelError: the hub refuses or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    bound_retries()
    api = HfApi()
    with _upload_errors(repo_id):
        url = _open_repository(api, repo_id, private, update)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return url if revision is None else f"{url}/tree/{revision}"


def _open_repository(api: Any, repo_id: str, private: bool, update: bool) -> str:
    """Make the repository, or take the one that is there if it may be written to; its address."""
    try:
        return str(api.create_repo(repo_id, private=True if private else None))
    except Exception as error:
        if status_of(error) != HTTPStatus.CONFLICT:
            raise
    if private and not api.repo_info(repo_id).private:
        raise UsageError(
            f"{repo_id} exists on the hub and is public: leave --private out, or give another name"
        )
    if not update and not BLANK.issuperset(api.list_repo_files(repo_id)):
        raise UsageError(
            f"{repo_id} exists on the hub: give another name, or --update to add a commit to it"
        )
    return f"{api.endpoint}/{repo_id}"


@contextmanager
def _upload_errors(repo_id: str) -> Iterator[None]:
    from huggingface_hub import errors as hub

    try:
        yield
    except PPOCliError:
        raise
    except hub.OfflineModeIsEnabled as error:
        raise ModelError("HF_HUB_OFFLINE forbids to upload: unset it") from error
    except Exception as error:
        raise ModelError(f"{repo_id}: {_problem(repo_id, error)}") from error


def _problem(repo_id: str, error: BaseException) -> str:
    owner, causes = repo_id.partition("/")[0], list(causes_of(error))  # of a thread's error, too
    status = next((found for cause in causes if (found := status_of(cause))), None)
    if status == HTTPStatus.UNAUTHORIZED:
        return "the hub does not accept the token: set HF_TOKEN to one that is valid"
    if status == HTTPStatus.FORBIDDEN:
        return (
            f"the token has no right to write to {owner}: give a repository of your own, or a "
            "token with the right to write"
        )
    if status is not None:
        return f"the hub answers {status} ({first_line(error)}): nothing was committed; try again"
    if any(map(is_of_network, causes)):
        return "the hub cannot be reached: check the network; nothing was committed"
    return f"{first_line(error).rstrip('. ')}; nothing was committed"
