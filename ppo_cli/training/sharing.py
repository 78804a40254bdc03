"""What of a run directory is for others: which files, and what of their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_cli.data.fingerprint import Inputs
from ppo_cli.errors import UsageError
from ppo_cli.models.model_card import CAUSAL, SEQ2SEQ, usage
from ppo_cli.training.records import METRICS_FILE, SAMPLES_FILE
from ppo_cli.training.run_directory import CARD_FILE, CONFIG_FILE, RunDirectory
from ppo_cli.utils.hub import ask_license
from ppo_cli.utils.inventory import CHECKPOINTS, MARKER, TRACKERS_FILE, WEIGHTS
from ppo_cli.utils.local_names import Records, public_card, public_json, public_values
from ppo_cli.utils.yaml_io import dump_yaml, read_yaml

PRIVATE = {
    SAMPLES_FILE: "texts of the prompts",
    TRACKERS_FILE: "names of the run in its trackers",
    MARKER: "of use here only",
}
# Endings of a run's files that others can use; what else is on the list stays.
SHARED = {".json", ".jinja", ".md", ".model", ".png", ".safetensors", ".spm", ".tiktoken", ".txt"}
# These hold a tokenizer's vocabulary, in which any text may be an entry.
VOCABULARY = {"tokenizer.json", "vocab.json", "added_tokens.json"}


@dataclass(frozen=True)
class SharedFile:
    """A file for others: its name, and the file, or its content where that is changed."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def shared_files(run: RunDirectory, repo_id: str) -> tuple[list[SharedFile], dict[str, str]]:
    """The files of a run that may leave this machine, and names of the others with the reason.

    Paths of this machine and secrets are taken out of texts and settings. Samples of the training
    prompts, checkpoints, logs of trackers, and files that no run wrote stay.

    Args:
        run: that exists.
        repo_id: what the model is called in its card from then on.

    Raises:
        UsageError: the run holds no model yet.
    """
    names = run.inventory.names() or frozenset()
    present = sorted(name for name in names if (run.path / name).is_file())
    if not any(WEIGHTS.fullmatch(n) and n != "value_head.safetensors" for n in present):
        raise UsageError(
            f"{run.path} holds no model yet: its run has not ended. End it with: ppo-cli train "
            f"--output {run.path} --resume"
        )
    files, stay = [], {}
    records = _records(run)
    for name in present:
        path = run.path / name
        if name in PRIVATE:
            stay[name] = PRIVATE[name]
        elif path.is_symlink():
            stay[name] = "a link"
        elif name in (METRICS_FILE, CONFIG_FILE) or path.suffix in SHARED:
            try:
                files.append(SharedFile(name, _content(path, name, run, repo_id, records)))
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{path} is damaged and cannot be read: write it anew with ppo-cli train "
                    f"--output {run.path} --resume"
                ) from error
        else:
            stay[name] = "of use here only"
    stay |= {name: "logs of trackers" for name in sorted(names) if name.endswith("/")}
    if run.checkpoints.is_dir():
        stay[f"{CHECKPOINTS}/"] = "for --resume"
    stay |= dict.fromkeys(run.inventory.strangers(), "no run wrote it")
    return files, stay


def with_license(files: Sequence[SharedFile]) -> list[SharedFile]:
    """The files; the card names the license of the base model if the hub knows it."""
    return [
        SharedFile(file.name, _licensed(file.content)) if file.name == CARD_FILE else file
        for file in files
    ]


def _licensed(content: Path | bytes) -> bytes:
    from huggingface_hub import ModelCard

    text = content if isinstance(content, bytes) else content.read_bytes()
    card = ModelCard(text.decode(), ignore_metadata_errors=True)
    data: Any = card.data
    if not isinstance(data.base_model, str) or data.license is not None:
        return text
    data.license = ask_license(data.base_model)
    return str(card).encode()


def _content(
    path: Path, name: str, run: RunDirectory, repo_id: str, records: Records
) -> Path | bytes:
    """The file as it is, or its content without what is private."""
    if name == CARD_FILE:
        text = path.read_text(encoding="utf-8")
        title = run.path.absolute().name
        for own in {title, str(run.path)}:
            for task in (CAUSAL, SEQ2SEQ):
                text = text.replace(usage(own, task), usage(repo_id, task))
        return public_card(text.replace(str(run.path.absolute()), title)).encode()
    if name == CONFIG_FILE:
        return dump_yaml(public_values(read_yaml(path), records, only_names=True)).encode()
    if path.suffix == ".json" and path.name not in VOCABULARY:
        return public_json(path.read_bytes(), records)
    return path


def _records(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """The records of the run's inputs, and of the bases of adapters, by name."""
    inputs = Inputs(run.recorded().get("inputs")).records
    entries = [*inputs.values(), *(entry.get("base") or {} for entry in inputs.values())]
    return {entry["name"]: entry for entry in entries if "name" in entry}
