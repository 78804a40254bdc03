"""Records of a run's inputs: digests of files, commits of hub repositories.

`run.yaml` holds the records. With them a resumed run, or a comparison with the run's reference,
finds inputs whose paths were relative to another folder, and detects inputs that have changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_cli.config.functions import function_file, function_parts
from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.config.reward import RewardConfig
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.embedded import TRAIN_SEED, classifier_folder, policy_folder
from ppo_cli.data.sources import EMBEDDED, all_files
from ppo_cli.utils.hub import TIMEOUT
from ppo_cli.utils.model_folder import ADAPTER_FILE, adapter_base, base_model, is_path

FUNCTION = ".function"  # end of the keys of reward functions
POLICY, CLASSIFIER, PROMPTS = "policy.model", "reward.model", "prompts.source"
MAX_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the size and some pieces are hashed
PIECES = 16
PIECE = 2**20  # bytes
MAX_FILES = 200  # recorded one by one; more are recorded together
MAX_NAMED = 3  # files in a message
# Endings of the files that are loaded from a model's folder. A run directory also holds records.
LOADED = {
    ".bin", ".gguf", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors",
    ".tiktoken", ".txt",
}  # fmt: skip
NOT_LOADED = {"frontier.json", "trainer_state.json"}
COMMIT = re.compile(r"[0-9a-f]{40}")

Record = dict[str, Any]
"""An input in `run.yaml`. `name` as given; for local files the absolute `path` and the digests of
`files`; for the hub `revision` and `commit`; for an adapter `base`, a record."""


@dataclass(frozen=True)
class Found:
    """An input that was located by its record.

    Attributes:
        name, revision: what to load: an existing path, or a hub id and a commit.
        changes: differences from the record, for a message.
        record: of the input as it is now.
    """

    name: str
    revision: str | None
    changes: list[str] = field(default_factory=list)
    record: Record | None = None


class Inputs:
    """The inputs that a run was started with, by the keys of the settings that name them.

    Args:
        records: from `run.yaml`; anything that is not a record is ignored.

    Attributes:
        shown: changes that were shown to the user already.
    """

    def __init__(self, records: Any) -> None:
        self.shown: set[str] = set()
        known = records.items() if isinstance(records, dict) else ()
        self.records: dict[str, Record] = {
            key: record
            for key, record in known
            if isinstance(record, dict) and "name" in record and _identity(record)
        }

    @classmethod
    def of(cls, config: RunConfig) -> Inputs:
        """Make records of the inputs that a configuration names, after they were loaded."""
        records = {key: record_of(key, *named) for key, named in _named(config).items()}
        return cls({key: record for key, record in records.items() if record})

    def locate(self, config: RunConfig) -> tuple[RunConfig, list[str], Inputs]:
        """Locate all inputs of a run.

        Returns:
            `config` with the places to load from as names; all changes; the inputs as they are now.
        """
        found = {key: self.find(key, *named) for key, named in _named(config).items()}
        policy = found[POLICY]
        sections = {
            "policy": {"model": policy.name, "revision": policy.revision},
            "reward": _located_reward(config.reward, found),
        }
        located = config.model_copy(
            update={
                name: getattr(config, name).model_copy(update=update)
                for name, update in sections.items()
            }
        )
        places = {key: (one.name, one.revision) for key, one in found.items()}
        located = located.model_copy(update={"prompts": located_prompts(config.prompts, places)})
        changes = [change for one in found.values() for change in one.changes]
        return located, changes, Inputs({key: one.record for key, one in found.items()})

    def locate_reward(self, reward: RewardConfig) -> tuple[RewardConfig, list[str]]:
        """Locate the classifiers and functions of a run's reward.

        Returns:
            `reward` with the places to load from as names; all changes.
        """
        found = {key: self.find(key, *named) for key, named in _reward_inputs(reward).items()}
        changes = [change for one in found.values() for change in one.changes]
        return reward.model_copy(update=_located_reward(reward, found)), changes

    def places_of_functions(self, reward: RewardConfig) -> dict[str, str]:
        """Each function of a run's reward -> the same in its file as it was recorded, if gone."""
        places = {}
        for key, (name, _) in _reward_inputs(reward).items():
            path = self.records.get(key, {}).get("path")
            if key.endswith(FUNCTION) and isinstance(path, str) and function_file(name) is None:
                places[name] = f"{path}:{function_parts(name)[1]}"
        return places

    def find(self, key: str, name: str, revision: str | None = None) -> Found:
        """Locate one input, which the settings now call `name`.

        A relative path may have been relative to another folder. The absolute path of the record is
        taken instead if the files there are as recorded and those of the relative path are not.
        """
        was = self.records.get(key)
        if was is None:
            return Found(name, revision)
        is_same_name = (name, revision) == (was["name"], was.get("revision"))
        if is_same_name and was.get("commit") and not _files(key, name):
            return _find_commit(key, was)
        places = [name]
        is_moved = is_same_name and isinstance(was.get("path"), str) and was["path"] != name
        if is_moved and not key.endswith(FUNCTION):  # the code that runs is what the user named
            places.append(was["path"])
        found = []
        for place in places:
            # A relative path that does not exist looks like a hub id.
            if "path" in was and is_same_name and not _files(key, place):
                continue
            if now := record_of(key, place, revision, ask=True):
                changes = _changes(f"{key} {name}", was, now)
                found.append(Found(place, revision, changes, now | {"name": name}))
                if not changes:
                    return found[-1]
        if found:
            return found[-1]  # the absolute path, which the run was made from
        gone = f"{key} {name} is not there"
        if "path" in was:
            gone += f" (it was {was['path']})"
        return Found(name, revision, [gone], was)


def trusted_too(trusted: Collection[str], names: Mapping[str, str]) -> set[str]:
    """`trusted`, with the places of the trusted names too; `names` maps names to places."""
    return {*trusted, *(place for name, place in names.items() if name in trusted)}


def record_of(
    key: str, name: str, revision: str | None = None, *, ask: bool = False
) -> Record | None:
    """Make the record of an input; None where nothing is known of it.

    Args:
        key: `POLICY`, one of `prompt_inputs`, that of a classifier or of a reward function.
        name, revision: from the settings.
        ask: ask the hub for the commit, not the cache, which knows the commit loaded last.
    """
    if name == EMBEDDED:
        return {"name": name, "files": _embedded(key)}
    record: Record
    if files := _files(key, name):
        record = {"name": name, **_absolute(name), "files": _digests(files)}
        if key.endswith(FUNCTION):
            return record | {"path": str(files[0].absolute())}
        adapter = Path(name) / ADAPTER_FILE
    elif key.endswith(FUNCTION) or is_path(name) or "://" in name:
        return None
    else:
        from huggingface_hub import try_to_load_from_cache

        kind = "dataset" if _is_prompts(key) else "model"
        commit = _commit(name, kind, revision, ask or kind == "dataset")
        if commit is None:
            return None
        record = {"name": name, **({"revision": revision} if revision else {}), "commit": commit}
        if kind == "dataset":
            return record
        adapter = Path(str(try_to_load_from_cache(name, ADAPTER_FILE, revision=commit)))
    if not _is_prompts(key) and (base := _base(key, adapter)):
        record["base"] = base
    return record


def _named(config: RunConfig) -> dict[str, tuple[str, str | None]]:
    return {
        POLICY: (config.policy.model, config.policy.revision),
        **_reward_inputs(config.reward),
        **prompt_inputs(config.prompts),
    }


def _reward_inputs(reward: RewardConfig) -> dict[str, tuple[str, str | None]]:
    """Key -> name and revision of each classifier, and name of each function."""
    if reward.terms is None:
        return {CLASSIFIER: (reward.model, reward.revision)}
    named: dict[str, tuple[str, str | None]] = {}
    for i, term in enumerate(reward.terms):
        if term.model is not None:
            named[f"reward.terms.{i}.model"] = (term.model, term.revision)
        if term.function is not None:
            named[f"reward.terms.{i}{FUNCTION}"] = (term.function, None)
    return named


def _located_reward(reward: RewardConfig, found: Mapping[str, Found]) -> dict[str, Any]:
    """What changes in a reward whose inputs were located."""
    if reward.terms is None:
        return {"model": found[CLASSIFIER].name, "revision": found[CLASSIFIER].revision}
    terms = []
    for i, term in enumerate(reward.terms):
        if model := found.get(f"reward.terms.{i}.model"):
            term = term.model_copy(update={"model": model.name, "revision": model.revision})
        terms.append(term)
    return {"terms": terms}


def prompt_inputs(prompts: PromptsConfig) -> dict[str, tuple[str, str | None]]:
    """Key of each source of prompts -> its name and revision."""
    found: dict[str, tuple[str, str | None]] = {}
    for number, one in enumerate(prompts.mixture):
        section = "prompts" if prompts.sources is None else f"prompts.sources.{number}"
        found[f"{section}.source"] = one.source, one.revision
        if one.held_out_source is not None:
            found[f"{section}.held_out_source"] = one.held_out_source, None
    return found


def located_prompts(
    prompts: PromptsConfig, places: Mapping[str, tuple[str, str | None]]
) -> PromptsConfig:
    """`prompts` with the places of its sources, by the keys of `prompt_inputs`, as their names."""

    def update(section: str) -> dict[str, Any]:
        source, revision = places[f"{section}.source"]
        held_out = f"{section}.held_out_source"
        apart = {"held_out_source": places[held_out][0]} if held_out in places else {}
        return {"source": source, "revision": revision, **apart}

    if prompts.sources is None:
        return prompts.model_copy(update=update("prompts"))
    sources = [
        source.model_copy(update=update(f"prompts.sources.{number}"))
        for number, source in enumerate(prompts.sources)
    ]
    return prompts.model_copy(update={"sources": sources})


def _is_prompts(key: str) -> bool:
    return key.startswith("prompts.")


def _files(key: str, name: str) -> list[Path]:
    """Local files of an input; none where it is not local."""
    if _is_prompts(key):
        return all_files(name)
    if key.endswith(FUNCTION):
        file = function_file(name)
        return [file] if file else []
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
    if _is_prompts(key):
        from ppo_cli.data.embedded.grammar import reviews

        texts = "\n".join(review.text for review in reviews(100, TRAIN_SEED))
        return {"first texts": f"sha256 {hashlib.sha256(texts.encode()).hexdigest()}"}
    folder = policy_folder() if key == POLICY else classifier_folder()
    return _digests(_files(key, str(folder)))


def _base(key: str, adapter: Path) -> Record | None:
    """Make the record of an adapter's base model, which the adapter's configuration names."""
    name, revision = base_model(adapter)
    if name is None:
        return None
    if files := _files(key, name):
        return {"name": name, **_absolute(name), "files": _digests(files)}
    commit = None if is_path(name) else _commit(name, "model", revision, ask=True)
    return {"name": name, **({"commit": commit} if commit else {})}


def _absolute(name: str) -> Record:
    """The absolute path, unless it is not valid UTF-8."""
    path = os.path.abspath(os.path.expanduser(name))
    try:
        path.encode()
    except UnicodeEncodeError:
        return {}
    return {"path": path}


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """Path below the common folder of all files -> digest."""
    top = (
        files[0].parent if len(files) == 1 else Path(os.path.commonpath([f.parent for f in files]))
    )
    digests = {
        os.fsencode(file.relative_to(top)).decode(errors="backslashreplace"): _digest(file)
        for file in files
    }
    if len(digests) <= MAX_FILES:
        return digests
    together = hashlib.sha256("\n".join(f"{n}\t{d}" for n, d in digests.items()).encode())
    return {f"{len(digests)} files": f"sha256 {together.hexdigest()}"}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for block in _whole(file) if size <= MAX_HASHED_WHOLE else _pieces(file, size):
                digest.update(block)
    except OSError as error:  # not every file is needed; loading reports those that are
        return f"not readable: {error.strerror}"
    of = "" if size <= MAX_HASHED_WHOLE else f"{size} bytes, in pieces "
    return f"{of}sha256 {digest.hexdigest()}"


def _whole(file: Any) -> Iterator[bytes]:
    while block := file.read(PIECE):
        yield block


def _pieces(file: Any, size: int) -> Iterator[bytes]:
    """Pieces at equal distances, from the first to the last."""
    for i in range(PIECES):
        file.seek(i * (size - PIECE) // (PIECES - 1))
        yield file.read(PIECE)


def _changes(what: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of an input from its record; what the hub does not answer is not compared."""
    changes = []
    before, after = _dict(was, "files"), _dict(now, "files")
    if before and not after and not now.get("commit"):
        changes.append(f"{what} is not there (it was {was.get('path')})")
    elif before and after:
        names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        named = [_file_change(n, before.get(n), after.get(n)) for n in names[:MAX_NAMED]]
        if names:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            changes.append(f"{what}: {', '.join(named)}{more}")
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
    """Locate a hub repository at the recorded commit, also if its branch has moved on."""
    name, commit = was["name"], str(was["commit"])
    what = f"{key} {name}"
    kind = "dataset" if _is_prompts(key) else "model"
    if kind == "dataset" and not was.get("revision"):
        now = record_of(key, name, ask=True)
        return Found(name, None, _changes(what, was, now) if now else [], now or was)
    if not _is_available(name, commit, kind):
        now = record_of(key, name, was.get("revision"), ask=True)
        gone = f"{what}: the hub no longer has its commit {commit[:12]}"
        return Found(name, was.get("revision"), [gone], now)
    pinned = record_of(key, name, commit, ask=True) or {}
    if "base" not in pinned:  # the cache may not have the adapter's configuration
        pinned["base"] = was.get("base")
    return Found(name, commit, _changes(what, was, pinned), was)


def _is_available(name: str, commit: str, kind: str) -> bool:
    """Whether a commit can be loaded; True where the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    if (_cache(name, kind) / "snapshots" / commit).is_dir():
        return True
    try:
        HfApi().repo_info(name, repo_type=kind, revision=commit, timeout=TIMEOUT)
    except RevisionNotFoundError:
        return False
    except Exception:
        return True  # loading gives the better message
    return True


def _commit(name: str, kind: str, revision: str | None, ask: bool) -> str | None:
    """The commit of a revision of a hub repository; None where it is unknown."""
    from huggingface_hub import HfApi

    if COMMIT.fullmatch(revision or ""):
        return revision
    try:
        if ask:
            info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
            return info.sha
    except Exception:
        pass  # then the commit in the cache will be loaded
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
    """Inputs of a run: key of the configuration -> folder, file or name on the hub."""
    found = {key: name for key, (name, _) in prompt_inputs(config.prompts).items()}
    models = {"policy.model": config.policy.model}
    for key, (name, _) in _reward_inputs(config.reward).items():
        if not key.endswith(FUNCTION):
            models[key] = name
        elif file := function_file(name):
            found[key] = str(file)
    for key, model in models.items():
        found[key] = model
        if base := adapter_base(model):
            found[f"the base model of {key}"] = base
    return {key: name for key, name in found.items() if name != "embedded"}
