"""The dataloader that a trainer makes of a dataset, and what is refused as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, IterableDataset

from ppo_cli.errors import UsageError
from tests.conftest import make_trainer

ROWS = [{"query": f"t{i}", "input_ids": [i, i], "extra": i} for i in range(20)]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


@pytest.mark.parametrize(
    ("dataset", "has_extra"),
    [
        (Stream(), True),
        (Dataset.from_list(ROWS).to_iterable_dataset(), False),
        (Dataset.from_list(ROWS).to_iterable_dataset().map(lambda row: row), False),
    ],
    ids=["torch", "datasets", "datasets, mapped"],
)
def test_a_stream_of_rows_is_read_in_its_order(dataset: Any, has_extra: bool) -> None:
    loader = make_trainer(dataset=dataset, data_collator=columns).dataloader
    batches = list(loader)
    assert [len(batch["query"]) for batch in batches] == [8, 8]
    assert batches[0]["query"] == [f"t{i}" for i in range(8)]
    assert ("extra" in batches[0]) is has_extra


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (DatasetDict(train=Dataset.from_list(ROWS)), "DatasetDict with the splits train: pass one"),
        (DataLoader(ROWS), "dataset is a DataLoader: pass the rows"),  # type: ignore[arg-type]
        ("imdb", "must have rows, as a Dataset or a list has them, got str"),
        (7, "got int"),
        ([], "dataset has no rows"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_dataset_is_refused_by_name(dataset: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer(dataset=dataset)


def test_what_a_trainer_is_not_made_of_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"got Linear: pass AutoModel.*from_pretrained\(model\)"):
        make_trainer(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer must be a PreTrainedTokenizerBase, got str"):
        make_trainer(tokenizer="gpt2")
