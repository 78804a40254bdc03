"""What a run is made from, known again: files by their contents, hub repositories by their commit.

`run.yaml` holds a record of each input. By it a resumed run, or what compares a run with its
reference, finds an input whose path is relative to another folder, and tells one that has changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.embedded import TRAIN_SEED, classifier_folder, policy_folder
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.utils.hub import TIMEOUT, adapter_base, is_path

POLICY, CLASSIFIER, PROMPTS = "policy.model", "reward.model", "prompts.source"
WHOLE = 64 * 2**20
"""Files up to this size, bytes, are hashed whole; of larger ones their size and pieces are."""
PIECES = 16
PIECE = 2**20  # bytes
MOST_FILES = 200
"""Where there are more they are recorded together."""
MOST_NAMED = 3
# What is loaded from the top of a model's folder. A run directory among them holds records, too.
LOADED = {
    ".bin", ".gguf", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors",
    ".tiktoken", ".txt",
}  # fmt: skip
NOT_LOADED = {"frontier.json", "trainer_state.json"}
ADAPTER_FILE = "adapter_config.json"
COMMIT = re.compile(r"[0-9a-f]{40}")

Record = dict[str, Any]
"""An input as `run.yaml` has it: `name` as given; `path`, absolute, and `files` with their digests
of what lies here; `revision` and `commit` of what the hub has; `base`, a record, of an adapter."""


@dataclass(frozen=True)
class Found:
    """An input looked for by its record.

    Attributes:
        name, revision: what to load: a path that is there; of a hub model the commit.
        changes: how it differs from its record, for a message; empty where it does not.
        record: of what was found.
    """

    name: str
    revision: str | None
    changes: list[str] = field(default_factory=list)
    record: Record | None = None


class Inputs:
    """The inputs that a run was started from, by the keys of the settings that name them.

    Args:
        records: as `run.yaml` has them; of what is no record nothing is known.

    Attributes:
        told: changes that the user was told of already.
    """

    def __init__(self, records: Any) -> None:
        self.told: set[str] = set()
        known = records.items() if isinstance(records, dict) else ()
        self.records: dict[str, Record] = {
            key: record
            for key, record in known
            if isinstance(record, dict) and "name" in record and _identity(record)
        }

    @classmethod
    def of(cls, config: RunConfig) -> Inputs:
        """Those that a configuration names, as they are now, once they have been loaded."""
        records = {key: record_of(key, *named) for key, named in _named(config).items()}
        return cls({key: record for key, record in records.items() if record})

    def locate(self, config: RunConfig) -> tuple[RunConfig, list[str], Inputs]:
        """Find all inputs of a run.

        Returns:
            `config` with what to load in place of the names; all changes; what was found.
        """
        found = {key: self.find(key, *named) for key, named in _named(config).items()}
        policy, classifier, prompts = (found[key] for key in (POLICY, CLASSIFIER, PROMPTS))
        sections = {
            "policy": {"model": policy.name, "revision": policy.revision},
            "reward": {"model": classifier.name, "revision": classifier.revision},
            "prompts": {"source": prompts.name},
        }
        located = config.model_copy(
            update={
                name: getattr(config, name).model_copy(update=update)
                for name, update in sections.items()
            }
        )
        changes = [change for one in found.values() for change in one.changes]
        return located, changes, Inputs({key: one.record for key, one in found.items()})

    def find(self, key: str, name: str, revision: str | None = None) -> Found:
        """One input, which the settings now call `name`.

        Of a path that was relative to another folder the absolute one is taken, where what lies
        there is as recorded and what lies here is not.
        """
        was = self.records.get(key)
        if was is None:
            return Found(name, revision)
        is_same_name = (name, revision) == (was["name"], was.get("revision"))
        if is_same_name and was.get("commit") and not _files(key, name):
            return _find_commit(key, was)
        places = [name]
        if is_same_name and isinstance(was.get("path"), str) and was["path"] != name:
            places.append(was["path"])
        found = []
        for place in places:
            # A relative path looks like a hub id where it does not lead anywhere.
            if "path" in was and is_same_name and not _files(key, place):
                continue
            if now := record_of(key, place, revision, ask=True):
                changes = _changes(f"{key} {name}", was, now)
                found.append(Found(place, revision, changes, now | {"name": name}))
                if not changes:
                    return found[-1]
        if found:
            return found[-1]  # the absolute path is what the run was made from
        gone = f"{key} {name} is not there"
        if "path" in was:
            gone += f" (it was {was['path']})"
        return Found(name, revision, [gone], was)


def trusted_too(trusted: Collection[str], names: Mapping[str, str]) -> set[str]:
    """`trusted`, and where what is trusted lies: `names` has the one for the other."""
    return {*trusted, *(place for name, place in names.items() if name in trusted)}


def record_of(
    key: str, name: str, revision: str | None = None, *, ask: bool = False
) -> Record | None:
    """The record of an input; None where nothing can be told of it.

    Args:
        key: `POLICY`, `CLASSIFIER` or `PROMPTS`.
        name, revision: as the settings have them.
        ask: ask the hub for the commit, rather than the cache, which knows what was loaded last.
    """
    if name == EMBEDDED:
        return {"name": name, "files": _embedded(key)}
    record: Record
    if files := _files(key, name):
        record = {"name": name, **_absolute(name), "files": _digests(files)}
        adapter = Path(name) / ADAPTER_FILE
    elif is_path(name) or "://" in name:
        return None
    else:
        from huggingface_hub import try_to_load_from_cache

        kind = "dataset" if key == PROMPTS else "model"
        commit = _commit(name, kind, revision, ask or kind == "dataset")
        if commit is None:
            return None
        record = {"name": name, **({"revision": revision} if revision else {}), "commit": commit}
        if kind == "dataset":
            return record
        adapter = Path(str(try_to_load_from_cache(name, ADAPTER_FILE, revision=commit)))
    if key != PROMPTS and (base := _base(key, adapter)):
        record["base"] = base
    return record


def data_files(source: str) -> list[Path]:
    """The files that a prompts source names: itself, those of a folder or of a pattern; or none."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    if os.path.isfile(path):
        return [path]
    return sorted(
        Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)
    )


def what_differs(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How code and machine differ from a record of them, as `torch 2.9.0 (now 2.9.1)`.

    Args:
        was, now: `versions`, `git_commit`, `machine` and `kernels`, as `run.yaml` has them. What
            one of them does not have is not compared.
    """

    def flat(record: Mapping[str, Any]) -> dict[str, str]:
        values = {**_dict(record, "versions"), **_dict(record, "machine")}
        if commit := record.get("git_commit"):
            values["git commit"] = str(commit)[:12]
        if paths := _dict(record, "kernels"):
            used = [str(name) for name, how in paths.items() if how == "used"]
            values["fast paths"] = ", ".join(used) or "none"
        return {key: str(value) for key, value in values.items()}

    before, after = flat(was), flat(now)
    return [
        f"{key} {value} (now {after[key]})"
        for key, value in before.items()
        if key in after and after[key] != value
    ]


def _named(config: RunConfig) -> dict[str, tuple[str, str | None]]:
    return {
        POLICY: (config.policy.model, config.policy.revision),
        CLASSIFIER: (config.reward.model, config.reward.revision),
        PROMPTS: (config.prompts.source, None),
    }


def _files(key: str, name: str) -> list[Path]:
    """What is read of an input that lies here; nothing where there is none."""
    if key == PROMPTS:
        return data_files(name)
    folder = Path(name)
    if not os.path.isdir(folder):
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in LOADED
        and path.name not in NOT_LOADED
        and not path.name.startswith(".")
        and path.is_file()
    )


def _embedded(key: str) -> dict[str, str]:
    if key == PROMPTS:
        from ppo_cli.data.embedded.grammar import reviews

        texts = "\n".join(review.text for review in reviews(100, TRAIN_SEED))
        return {"first texts": f"sha256 {hashlib.sha256(texts.encode()).hexdigest()}"}
    folder = policy_folder() if key == POLICY else classifier_folder()
    return _digests(_files(key, str(folder)))


def _base(key: str, adapter: Path) -> Record | None:
    """The record of the model that an adapter is for, by the adapter's configuration."""
    try:
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        name, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(name, str) or not name:
        return None
    if files := _files(key, name):
        return {"name": name, **_absolute(name), "files": _digests(files)}
    commit = None if is_path(name) else _commit(name, "model", revision, ask=True)
    return {"name": name, **({"commit": commit} if commit else {})}


def _absolute(name: str) -> Record:
    """The absolute path, where it can be written down: not all bytes of a path are text."""
    path = os.path.abspath(os.path.expanduser(name))
    try:
        path.encode()
    except UnicodeEncodeError:
        return {}
    return {"path": path}


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """Name -> digest, by paths below the folder that holds all files."""
    top = (
        files[0].parent if len(files) == 1 else Path(os.path.commonpath([f.parent for f in files]))
    )
    digests = {
        os.fsencode(file.relative_to(top)).decode(errors="backslashreplace"): _digest(file)
        for file in files
    }
    if len(digests) <= MOST_FILES:
        return digests
    together = hashlib.sha256("\n".join(f"{n}\t{d}" for n, d in digests.items()).encode())
    return {f"{len(digests)} files": f"sha256 {together.hexdigest()}"}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for block in _whole(file) if size <= WHOLE else _pieces(file, size):
                digest.update(block)
    except OSError as error:  # what needs the file says so; not all of them are needed
        return f"not readable: {error.strerror}"
    of = "" if size <= WHOLE else f"{size} bytes, in pieces "
    return f"{of}sha256 {digest.hexdigest()}"


def _whole(file: Any) -> Iterator[bytes]:
    while block := file.read(PIECE):
        yield block


def _pieces(file: Any, size: int) -> Iterator[bytes]:
    """Pieces at equal distances, the first and the last among them."""
    for i in range(PIECES):
        file.seek(i * (size - PIECE) // (PIECES - 1))
        yield file.read(PIECE)


def _changes(what: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How one input differs from its record; what the hub does not tell does not differ."""
    changes = []
    before, after = _dict(was, "files"), _dict(now, "files")
    if before and not after and not now.get("commit"):
        changes.append(f"{what} is not there (it was {was.get('path')})")
    elif before and after:
        names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        told = [_file_change(n, before.get(n), after.get(n)) for n in names[:MOST_NAMED]]
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            changes.append(f"{what}: {', '.join(told)}{more}")
    elif _identity(was) != _identity(now) and None not in (_identity(was), _identity(now)):
        changes.append(f"{what} was {_identity(was)}, now {_identity(now)}")
    base, new_base = _dict(was, "base"), _dict(now, "base")
    if base and base.get("name") != new_base.get("name"):
        changes.append(f"{what} is an adapter of {new_base.get('name')}, was of {base.get('name')}")
    elif base:
        changes += _changes(f"{what}: its base model {base.get('name')}", base, new_base)
    return changes


def _identity(record: Mapping[str, Any]) -> str | None:
    if commit := record.get("commit"):
        return f"commit {str(commit)[:12]}"
    files = isinstance(record.get("files"), dict)
    return f"the files of {record.get('path', record.get('name'))}" if files else None


def _file_change(name: str, was: str | None, now: str | None) -> str:
    if was is None:
        return f"{name} is new"
    if now is None:
        return f"{name} is gone"
    return f"{name} has changed ({_short(was)}, now {_short(now)})"


def _short(digest: str) -> str:
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1", str(digest))


def _dict(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _find_commit(key: str, was: Record) -> Found:
    """A hub repository, at the commit that was recorded, whatever its branch has by now."""
    name, commit = was["name"], str(was["commit"])
    what = f"{key} {name}"
    if key == PROMPTS:
        now = record_of(key, name, ask=True)
        return Found(name, None, _changes(what, was, now) if now else [], now or was)
    if not _is_available(name, commit):
        now = record_of(key, name, was.get("revision"), ask=True)
        gone = f"{what}: the hub no longer has its commit {commit[:12]}"
        return Found(name, was.get("revision"), [gone], now)
    pinned = record_of(key, name, commit, ask=True) or {}
    if "base" not in pinned:  # the cache may not have the adapter's configuration
        pinned["base"] = was.get("base")
    return Found(name, commit, _changes(what, was, pinned), was)


def _is_available(name: str, commit: str) -> bool:
    """Whether a commit can be loaded, as far as that is known."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    if (_cache(name, "model") / "snapshots" / commit).is_dir():
        return True
    try:
        HfApi().repo_info(name, revision=commit, timeout=TIMEOUT)
    except RevisionNotFoundError:
        return False
    except Exception:
        return True  # loading it says best what is wrong
    return True


def _commit(name: str, kind: str, revision: str | None, ask: bool) -> str | None:
    """The commit that a hub repository's revision stands for; None where it cannot be told."""
    from huggingface_hub import HfApi

    if COMMIT.fullmatch(revision or ""):
        return revision
    try:
        if ask:
            info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
            return info.sha
    except Exception:
        pass  # then what the cache has is what will be loaded
    try:
        commit = (_cache(name, kind) / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _cache(name: str, kind: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))


def inputs_of(config: RunConfig) -> dict[str, str]:
    """What a run reads: key of the configuration -> folder, file or name on the hub."""
    found = {"prompts.source": config.prompts.source}
    for key, model in (
        ("policy.model", config.policy.model),
        ("reward.model", config.reward.model),
    ):
        found[key] = model
        if base := adapter_base(model):
            found[f"the base model of {key}"] = base
    return {key: name for key, name in found.items() if name != "embedded"}  # which is no folder
