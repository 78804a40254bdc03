"""What is flushed to the disk, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ppo_cli.training.checkpoint import save_checkpoint
from ppo_cli.utils.files import replacing


def watched(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """A list that receives the file of each flush, and whether `place` was there by then."""
    flushed: list[tuple[int, bool]] = []

    def flush(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, place.exists()))

    monkeypatch.setattr(os, "fsync", flush)
    return flushed


def test_a_file_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.txt"
    flushed = watched(place, monkeypatch)
    with replacing(place) as unfinished:
        unfinished.write_text("a")
    assert flushed == [(place.stat().st_ino, False)]


def test_a_checkpoint_is_flushed_before_it_gets_its_name_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "step-000001"
    flushed = watched(place, monkeypatch)
    save_checkpoint(tmp_path, 1, torch.nn.Linear(2, 1), {"step": 1}, keep=1)
    before = {file.stat().st_ino for file in (place, *place.iterdir())}
    assert len(before) == 5  # weights, tensors, state, manifest, folder
    assert {file for file, there in flushed if not there} == before
    assert [file for file, there in flushed if there] == [tmp_path.stat().st_ino]
