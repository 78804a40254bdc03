"""A sequence classifier: loading it, its labels, and batches of rows of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ppo_cli.errors import ModelError
from ppo_cli.models.pretrained import HUB_KEYWORDS, base_errors, base_keywords, find_adapter
from ppo_cli.utils.model_checks import implementations, refuse_misshaped, refuse_missing

Row = Mapping[str, Sequence[int]]
"""The tokens of a text: `input_ids`, and the model's other inputs for each token."""
MAX_TRIED_ROWS = 8
"""Maximum number of rows of a batch that are also read alone, for comparison."""


def load_classifier(name: str, **kwargs: Any) -> tuple[Any, list[str]]:
    """A sequence classifier in float32 from a folder or the hub, and the names of its outputs.

    An adapter is merged into its base model if its kind can be.

    Args:
        name: folder or hub id of a classifier or of a peft adapter.
        kwargs: arguments of `from_pretrained`.

    Raises:
        ModelError: it is no sequence classifier, or some of its weights are missing.
    """
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    adapter = find_adapter(name, **hub)
    if adapter is None:
        model, labels, missing = _load_whole(name, **kwargs)
        refuse_missing(name, missing)
        return model, labels
    if (task := adapter.config.task_type) != "SEQ_CLS":
        raise ModelError(
            f"{name} is an adapter of another kind of model (task_type {task}), not "
            "of a sequence classifier: choose one that was saved with task_type SEQ_CLS"
        )
    from peft import PeftModelForSequenceClassification, load_peft_weights

    saved = load_peft_weights(adapter.folder, device="cpu")
    own = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    with base_errors(name, adapter):
        base, labels, missing = _load_whole(
            adapter.base, head=own, **base_keywords(adapter, kwargs)
        )
    if lacking := set(missing) - set(own):
        raise ModelError(
            f"{name}: neither this adapter nor its base model has {', '.join(sorted(lacking))}, "
            "which would be random numbers: save the adapter with its head among modules_to_save"
        )
    adapted = PeftModelForSequenceClassification.from_pretrained(
        base, adapter.folder, config=adapter.config
    )
    can_merge = hasattr(adapted, "merge_and_unload")  # virtual tokens cannot
    return adapted.merge_and_unload() if can_merge else adapted, labels


def _load_whole(
    name: str, head: Mapping[str, Tensor] | None = None, **kwargs: Any
) -> tuple[Any, list[str], list[str]]:
    """A classifier, the names of its outputs, and the weights that its files lack.

    Args:
        name: folder or hub id.
        head: weights that are loaded later; if they have another number of rows than the
            configuration has labels, the classifier gets that number of outputs.
        kwargs: arguments of `from_pretrained`.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

    config = AutoConfig.from_pretrained(name, **kwargs)
    architectures = config.architectures or []
    if (
        head is None
        and architectures
        and not any(item.endswith("ForSequenceClassification") for item in architectures)
    ):
        raise ModelError(
            f"{name} is a {architectures[0]}, not a sequence classifier: choose one whose "
            "architecture ends in ForSequenceClassification"
        )
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    written = PreTrainedConfig.get_config_dict(name, **hub)[0].get("id2label") or {}
    names = {int(key): str(value) for key, value in written.items()}
    sizes = [config.num_labels]
    if head is not None:
        sizes = [_outputs(config, head)]
    elif sorted(names) != list(range(len(names))):  # the weights decide the number of outputs
        sizes = [*sizes, len(names), max(names) + 1]
    trust = kwargs.get("trust_remote_code", False)
    for size in dict.fromkeys(sizes):
        config.num_labels = size
        chosen = {**kwargs, "config": config, **implementations(name, config, trust)}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **chosen,
        )
        unfit = {key for key, *_ in info["mismatched_keys"]}
        if head is not None or not unfit:
            break
        if len(sizes) == 1:
            refuse_misshaped(name, info["mismatched_keys"])
    else:
        raise ModelError(
            f"{name}: its configuration names the labels {', '.join(map(str, names))} (id2label), "
            "which are not as many as its weights have outputs: number them from 0"
        )
    if head is not None and size != len(names):
        names = {}  # these belong to another head
    return model, label_names(name, names, size), [*info["missing_keys"], *unfit]


def _outputs(config: Any, head: Mapping[str, Tensor]) -> int:
    """Number of outputs of a classifier of this configuration, with these weights in its head."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        plan = AutoModelForSequenceClassification.from_config(config).state_dict()
    sizes = {len(head[key]) for key in head if key in plan and head[key].shape != plan[key].shape}
    return int(sizes.pop()) if len(sizes) == 1 else int(config.num_labels)


def label_names(classifier: str, names: Mapping[int, str], outputs: int) -> list[str]:
    """The name of each output, by the index of its logit.

    Args:
        classifier: named in the message.
        names: `id2label` of the configuration. Its ids are indices of logits, or all outputs are
            counted from 1. An output without a name is `LABEL_i`, as in `transformers`.
        outputs: the number of outputs.

    Raises:
        ModelError: there is no output for an id.
    """
    if sorted(names) == list(range(1, outputs + 1)):
        names = {i - 1: name for i, name in names.items()}
    if beyond := sorted(set(names) - set(range(outputs))):
        raise ModelError(
            f"{classifier}: its configuration names the label {names[beyond[0]]!r} {beyond[0]} "
            f"(id2label), and there are {outputs} outputs, 0 to {outputs - 1}: mend config.json"
        )
    return [names.get(i, f"LABEL_{i}") for i in range(outputs)]


class Padding:
    """Puts rows of several lengths into one batch, unless padding changes the scores.

    Padding has no effect on most classifiers. For the others (convolutions over tokens, Fourier
    transforms, chunks) a batch holds rows of one length only. To find out, some rows of the first
    batch, and of each batch that is wider than all before, are also read alone.

    Args:
        classifier: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, classifier: Any, tokenizer: Any) -> None:
        self._config = classifier.config.get_text_config()
        self._side = (
            "left" if classifier.config.model_type == "xlnet" else "right"
        )  # it classifies the last token
        forward = (
            classifier.get_base_model() if hasattr(classifier, "get_base_model") else classifier
        )
        self._reads = set(inspect.signature(forward.forward).parameters)
        self._fill = {"token_type_ids": tokenizer.pad_token_type_id}
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
        self._nothing = next(i for i in ids if i is not None)
        pad, size = self._config.pad_token_id, getattr(self._config, "vocab_size", None)
        self._pad = pad if pad is not None and 0 <= pad < (size or pad + 1) else None
        self._is_harmless = True
        self._tried = 0

    def batches(self, texts: Sequence[str], rows: Sequence[Row], size: int) -> Iterator[list[int]]:
        """Indices of the rows of each batch, at most `size`."""
        if self._is_harmless:
            groups = [sorted(range(len(rows)), key=lambda i: len(texts[i]))]  # similar lengths
        else:
            by_length: dict[int, list[int]] = {}
            for i, row in enumerate(rows):
                by_length.setdefault(len(row["input_ids"]), []).append(i)
            groups = list(by_length.values())
        for group in groups:
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The classifier's arguments, (B, T) each."""
        ids = [list(row["input_ids"]) or [self._nothing] for row in rows]
        width = max(map(len, ids))
        pad = self._pad
        if pad is None:
            # Decoder classifiers score the last token that is not the padding token.
            lasts = {row[-1] for row in ids}
            pad = next(i for i in count() if i not in lasts)
            self._config.pad_token_id = pad

        def grid(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            left = self._side == "left"
            gaps = [[fill] * (width - len(row)) for row in values]
            lines = [
                [*gap, *row] if left else [*row, *gap]
                for gap, row in zip(gaps, values, strict=True)
            ]
            return torch.tensor(lines)

        batch = {"input_ids": grid(ids, pad)}
        batch["attention_mask"] = grid([[1] * len(row) for row in ids], 0)
        for key in set(rows[0]) - {"input_ids", "attention_mask"}:
            values = [list(row[key]) or [0] for row in rows]
            batch[key] = grid(values, self._fill.get(key, 0))
        return {key: value for key, value in batch.items() if key in self._reads}

    def untried(self, rows: Sequence[Row]) -> list[int]:
        """Indices of some rows to read alone, if there is more padding than was tried before."""
        lengths = [len(row["input_ids"]) for row in rows]
        widest = max(lengths)
        if min(lengths) == widest or widest <= self._tried:
            return []
        self._tried = widest
        padded = {length: i for i, length in enumerate(lengths) if length < widest}
        spread = sorted(padded)[:: -(-len(padded) // MAX_TRIED_ROWS)]
        return [padded[length] for length in spread]

    def is_harmless(self, together: Tensor, alone: Tensor) -> bool:
        """Whether logits of rows are the same in a batch and alone; the answer is kept."""
        self._is_harmless = is_same(together, alone)
        return self._is_harmless


def is_same(logits: Tensor, others: Tensor) -> bool:
    """Whether logits differ only by rounding."""
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-3, equal_nan=True)


def rows_of(encoded: Mapping[str, Sequence[Sequence[int]]]) -> list[Row]:
    """A tokenizer's output for several texts, as one row per text."""
    return [
        dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
    ]
