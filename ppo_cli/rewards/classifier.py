"""A sequence classifier: loading it, its labels, and rows of tokens that it reads together."""

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
"""A text as a tokenizer gives it: `input_ids`, and what else the model reads of each token."""
TRIED_ROWS = 8
"""How many rows of a batch are read alone, too, at most."""


def load_classifier(name: str, **kwargs: Any) -> tuple[Any, list[str]]:
    """A sequence classifier in float32 from a folder or the hub, and the names of its outputs.

    An adapter of one is merged into it where its kind can be.

    Args:
        name: folder or hub id of a classifier or of a peft adapter.
        kwargs: go to `from_pretrained`.

    Raises:
        ModelError: it is no sequence classifier, or weights of it are missing.
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
        head: weights that come later; where one has more rows, or fewer, than the configuration
            has labels, the classifier gets as many outputs.
        kwargs: go to `from_pretrained`.
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
    elif sorted(names) != list(range(len(names))):  # the weights know how many outputs there are
        sizes = [*sizes, len(names), max(names) + 1]
    trust = kwargs.get("trust_remote_code", False)
    for size in dict.fromkeys(sizes):
        config.num_labels = size
        chosen = {**kwargs, "config": config, **implementations(name, config, trust)}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused here, by name
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
        names = {}  # those are another head's
    return model, label_names(name, names, size), [*info["missing_keys"], *unfit]


def _outputs(config: Any, head: Mapping[str, Tensor]) -> int:
    """How many outputs a classifier of this configuration has, with these weights in its head."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        plan = AutoModelForSequenceClassification.from_config(config).state_dict()
    sizes = {len(head[key]) for key in head if key in plan and head[key].shape != plan[key].shape}
    return int(sizes.pop()) if len(sizes) == 1 else int(config.num_labels)


def label_names(classifier: str, names: Mapping[int, str], outputs: int) -> list[str]:
    """The name of each output, by the index of its logit.

    Args:
        classifier: named in the message.
        names: of a configuration's `id2label`. Its ids are the logits', but for those that count
            all outputs from 1; an output that it does not name is `LABEL_i`, as everywhere.
        outputs: how many there are.

    Raises:
        ModelError: an id is no output's.
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
    """Puts rows of several lengths into one batch, where that changes no score.

    Most classifiers do not see padding. Of those that do (convolutions over tokens, Fourier
    transforms, chunks) rows of one length alone are read together. Which kind one is shows when
    rows of several lengths are read alone as well: in the first batch, and in each that is wider
    than all before.

    Args:
        classifier: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, classifier: Any, tokenizer: Any) -> None:
        self._config = classifier.config.get_text_config()
        self._side = (
            "left" if classifier.config.model_type == "xlnet" else "right"
        )  # its last place counts
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
        """Indices of rows that are read together, `size` at most."""
        if self._is_harmless:
            groups = [sorted(range(len(rows)), key=lambda i: len(texts[i]))]  # alike together
        else:
            alike: dict[int, list[int]] = {}
            for i, row in enumerate(rows):
                alike.setdefault(len(row["input_ids"]), []).append(i)
            groups = list(alike.values())
        for group in groups:
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What the classifier is called with, (B, T) each."""
        ids = [list(row["input_ids"]) or [self._nothing] for row in rows]
        width = max(map(len, ids))
        pad = self._pad
        if pad is None:
            # Decoder classifiers score the last token that is not this one.
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
        """Which of `rows` to read alone: some, if they hold more padding than was tried before."""
        lengths = [len(row["input_ids"]) for row in rows]
        widest = max(lengths)
        if min(lengths) == widest or widest <= self._tried:
            return []
        self._tried = widest
        padded = {length: i for i, length in enumerate(lengths) if length < widest}
        spread = sorted(padded)[:: -(-len(padded) // TRIED_ROWS)]
        return [padded[length] for length in spread]

    def is_harmless(self, together: Tensor, alone: Tensor) -> bool:
        """Whether logits of rows are the same with others and alone, which is remembered."""
        self._is_harmless = is_same(together, alone)
        return self._is_harmless


def is_same(logits: Tensor, others: Tensor) -> bool:
    """Whether logits differ in rounding alone."""
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-3, equal_nan=True)


def rows_of(encoded: Mapping[str, Sequence[Sequence[int]]]) -> list[Row]:
    """What a tokenizer makes of several texts, as a row a text."""
    return [
        dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
    ]
