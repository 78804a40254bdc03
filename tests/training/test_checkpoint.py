"""Checkpoints are written whole or not at all, and restore the same state."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ppo_cli.errors import PPOCliError
from ppo_cli.training.checkpoint import (
    discard_newer,
    find_damage,
    load_checkpoint,
    save_checkpoint,
    whole_checkpoint,
)
from ppo_cli.utils.random_state import random_state, set_random_state


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in structure and value, tensors in type and shape too; tuples come back as lists."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected.cpu())
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    else:
        assert type(actual) is type(expected)
        assert actual == expected


def test_a_nested_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 7: {}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 7]}],
        },
        "random": torch.arange(10, dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
        "flags": [True, None, "ünï", -2, 1.5],
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": {},
    }
    path = save_checkpoint(tmp_path, 1, make_model(), state, keep=1)
    assert_same(load_checkpoint(path, make_model()), state)


def test_the_real_state_of_adam_goes_on_the_same_after_a_round_trip(tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, twin = make_model(), make_model(seed=1)
    twin[0].load_state_dict(model[0].state_dict())  # frozen weights come from the model's source
    adam, other = (torch.optim.Adam(m[1].parameters(), lr=0.05) for m in (model, twin))
    train(model, adam, 3)
    path = save_checkpoint(tmp_path, 3, model, {"optimizer": adam.state_dict()}, keep=1)
    other.load_state_dict(load_checkpoint(path, twin)["optimizer"])
    train(model, adam, 3)
    train(twin, other, 3)
    assert torch.equal(model[1].weight, twin[1].weight)


def test_trainable_weights_are_restored_in_place_and_frozen_ones_left_alone(tmp_path: Path) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    frozen, place = other[0].weight.clone(), other[1].weight.data_ptr()
    load_checkpoint(save_checkpoint(tmp_path, 5, model, {}, keep=1), other)
    assert torch.equal(other[1].weight, model[1].weight)
    assert torch.equal(other[1].bias, model[1].bias)
    assert other[1].weight.data_ptr() == place
    assert torch.equal(other[0].weight, frozen)


def test_what_is_saved_does_not_change_with_the_model_afterwards(tmp_path: Path) -> None:
    model, tensor = make_model(), torch.zeros(3)
    before = model[1].weight.detach().clone()
    path = save_checkpoint(tmp_path, 1, model, {"t": tensor}, keep=1)
    with torch.no_grad():
        model[1].weight.add_(1)
    tensor.add_(1)
    state = load_checkpoint(path, model)
    assert torch.equal(model[1].weight, before)
    assert state["t"].tolist() == [0, 0, 0]


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    path = save_checkpoint(
        tmp_path, 1, make_model(), {"best": float("-inf"), "nan": math.nan}, keep=1
    )
    state = load_checkpoint(path, make_model())
    assert state["best"] == float("-inf")
    assert math.isnan(state["nan"])


def test_every_random_state_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()]

    model = make_model()
    draw()  # Python and NumPy now hold a second normal number
    path = save_checkpoint(tmp_path, 1, model, {"random": random_state()}, keep=1)
    expected = draw()
    draw()
    set_random_state(load_checkpoint(path, model)["random"])
    assert draw() == expected


def test_the_newest_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        save_checkpoint(tmp_path, step, make_model(), {"step": step}, keep=2)
    assert len(list(tmp_path.iterdir())) == 2
    latest = whole_checkpoint(tmp_path)
    assert load_checkpoint(latest, make_model())["step"] == 100
    others = [p for p in tmp_path.iterdir() if p != latest]
    assert load_checkpoint(others[0], make_model())["step"] == 10


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, make_model(), {"try": 1}, keep=3)
    path = save_checkpoint(tmp_path, 4, make_model(), {"try": 2}, keep=3)
    assert load_checkpoint(path, make_model()) == {"try": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_whose_writing_was_cut_off_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, make_model(), {"step": 1}, keep=1)

    def cut_off(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_off)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, 2, make_model(), {"step": 2}, keep=1)
    assert load_checkpoint(whole_checkpoint(tmp_path), make_model())["step"] == 1
    # Another try writes the same step over what was left.
    path = save_checkpoint(tmp_path, 2, make_model(), {"step": 2}, keep=1)
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == [path]
    assert load_checkpoint(whole_checkpoint(tmp_path), make_model())["step"] == 2


def test_what_killed_processes_left_is_ignored_and_swept_away(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, make_model(), {"step": 3}, keep=1)
    for name in (".step-000010.tmp", ".step-000001.old", "notes"):
        (tmp_path / name).mkdir()
    assert whole_checkpoint(tmp_path).name == "step-000003"
    save_checkpoint(tmp_path, 4, make_model(), {"step": 4}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-000004"]


FILES = ("state.json", "tensors.safetensors", "weights.safetensors", "manifest.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
def test_damage_is_recognised_and_the_checkpoint_before_is_used(tmp_path: Path, file: str) -> None:
    state = {"random": torch.arange(9.0)}
    earlier = save_checkpoint(tmp_path, 2, make_model(), {"step": 2}, keep=9)
    path = save_checkpoint(tmp_path, 5, make_model(), state, keep=9)
    damaged = path / file
    whole = damaged.read_bytes()
    harms: list[Any] = [truncate, Path.unlink, lambda p: p.write_bytes(b"")]
    harms += [lambda p, bit=bit: flip(p, bit) for bit in range(0, 8 * len(whole), 37)]
    for harm in harms:
        harm(damaged)
        with pytest.warns(UserWarning, match="step-000005 is damaged .*from step-000002"):
            assert whole_checkpoint(tmp_path) == earlier
        damaged.write_bytes(whole)
    assert whole_checkpoint(tmp_path) == path
    for checkpoint in (earlier, path):
        (checkpoint / file).unlink()
    with pytest.raises(PPOCliError, match=r"step-000005 .*; .*step-000002 .*--overwrite") as caught:
        whole_checkpoint(tmp_path)
    assert caught.value.exit_code == 1


def test_every_byte_of_the_manifest_matters(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, make_model(), {}, keep=1)
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for byte in range(len(whole)):
        bit = 8 * byte + byte % 8
        flip(manifest, bit)
        assert find_damage(path), bit
        manifest.write_bytes(whole)
    assert find_damage(path) is None


def test_damaged_newer_checkpoints_are_discarded(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path, n, make_model(), {}, keep=9) for n in (1, 2, 3)]
    discard_newer(tmp_path, paths[0])
    assert list(tmp_path.iterdir()) == [paths[0]]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in range(6):
        save_checkpoint(tmp_path, step, make_model(), {}, keep=2, best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-00000{n}" for n in (1, 4, 5)]


def test_at_no_instant_of_saving_again_is_there_no_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 4, make_model(), {"try": 1}, keep=1)
    seen = []
    for name in ("rename", "unlink", "rmdir", "mkdir", "write_text"):
        original = getattr(Path, name)

        def watched(self: Path, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(load_checkpoint(whole_checkpoint(tmp_path), make_model())["try"])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, watched)
    path = save_checkpoint(tmp_path, 4, make_model(), {"try": 2}, keep=1)
    monkeypatch.undo()
    assert sorted(seen) == seen
    assert set(seen) == {1, 2}
    assert list(tmp_path.iterdir()) == [path]


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make_model(), {}, keep=1)
    with pytest.raises(PPOCliError, match=r"another model.*policy\.model"):
        load_checkpoint(path, nn.Linear(3, 3))


def test_a_run_without_a_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(PPOCliError, match=r"checkpoints is empty.*--overwrite"):
        whole_checkpoint(tmp_path / "my-run" / "checkpoints")
