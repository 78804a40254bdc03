"""Precision: the meaning of each name on each device; bfloat16 trains float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ppo_cli.config.loading import load_config
from ppo_cli.errors import UsageError
from ppo_cli.ppo.forward import check_reading
from ppo_cli.training.build import build_training
from ppo_cli.utils.device import computes_bfloat16, mixed_precision
from tests.conftest import SMALL_RUN, make_batch, make_gpt2, make_policy, make_trainer, weights

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize(
    ("name", "device", "native", "expected"),
    [
        ("auto", CPU, True, "bf16"),
        ("auto", CPU, False, "no"),
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "no"),
        ("fp32", CUDA, True, "no"),
        ("no", CPU, True, "no"),
        (False, CPU, True, "no"),  # how YAML reads a bare no
        ("bf16", CPU, False, "bf16"),
        ("fp16", CUDA, False, "fp16"),
        ("fp8", CUDA, True, "fp8"),
    ],
)
def test_what_accelerate_is_told(
    name: Any, device: torch.device, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppo_cli.utils.device.computes_bfloat16", lambda _: native)
    assert mixed_precision(name, device) == expected


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("fp16", CPU, "precision fp16 needs a CUDA GPU, not cpu: use bf16 or fp32"),
        ("fp16", MPS, "precision fp16 needs a CUDA GPU, not mps: use bf16 or fp32"),
        ("bf15", CPU, "precision 'bf15' is none of auto, fp32, bf16, fp16"),
        (True, CPU, "precision True is none of auto, fp32, bf16, fp16"),
    ],
)
def test_what_is_refused(name: Any, device: torch.device, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        mixed_precision(name, device)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(True, False, True), (False, True, True), (False, False, False), (None, None, False)],
)
def test_a_processor_computes_bfloat16_where_it_has_instructions_for_it(
    avx512: bool | None, amx: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for probe, answer in zip(probes, (avx512, amx), strict=True):
        if answer is None:  # torch may lack the probe
            monkeypatch.delattr(torch.cpu, probe, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, probe, lambda answer=answer: answer, raising=False)
    assert computes_bfloat16(CPU) is expected
    assert not computes_bfloat16(MPS)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("asked", "used"), [("bf16", "bf16"), ("auto", "bf16"), ("fp32", "no"), (None, "no")]
)
def test_a_step_trains_float32_weights_with_float32_gradients(
    asked: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppo_cli.utils.device.computes_bfloat16", lambda _: True)
    gradients: set[torch.dtype] = set()
    multiplied: set[torch.dtype] = set()
    adam_step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients.update(p.grad.dtype for p in parameters if p.grad is not None)
        return adam_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    kwargs = {} if asked is None else {"accelerator_kwargs": {"mixed_precision": asked}}
    trainer = make_trainer(**kwargs)
    inner = trainer.accelerator.unwrap_model(trainer.model).pretrained_model

    def see(module: Any, args: Any, output: torch.Tensor) -> None:
        multiplied.add(output.dtype)

    inner.transformer.h[0].mlp.c_fc.register_forward_hook(see)
    check_reading(trainer.model)
    check_reading(trainer.ref_model)
    multiplied.clear()
    before = weights(trainer.model)
    stats = trainer.step(*make_batch())
    assert trainer.accelerator.mixed_precision == used
    assert multiplied == {torch.bfloat16 if used == "bf16" else torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == gradients == {torch.float32}
    assert all(np.isfinite(value).all() for value in stats.values())
    after = weights(trainer.model)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("mini_batch_size", [8, 2])
@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
def test_in_bfloat16_an_untouched_policy_has_no_kl_from_its_reference_at_all(
    mini_batch_size: int, kl_penalty: str
) -> None:
    settings = {"accelerator_kwargs": {"mixed_precision": "bf16"}, "kl_penalty": kl_penalty}
    trainer = make_trainer(mini_batch_size=mini_batch_size, **settings)
    stats = trainer.step(*make_batch())
    assert stats["objective/kl"] == 0
    assert not stats["objective/kl_dist"].any()
    np.testing.assert_array_equal(stats["objective/logprobs"], stats["objective/ref_logprobs"])
    assert trainer.step(*make_batch(seed=1))["objective/kl"] != 0


def test_statistics_in_bfloat16_are_near_those_in_float32() -> None:
    batch = make_batch()
    results = []
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        kwargs = {"accelerator_kwargs": {"mixed_precision": precision}}
        trainer = make_trainer(make_policy(), make_gpt2(1), **kwargs, ppo_epochs=1)
        results.append(trainer.step(*batch))
    full, low = results
    for key, atol in {
        "objective/kl": 0.5,
        "objective/entropy": 0.5,
        "ppo/mean_non_score_reward": 0.02,
        "ppo/policy/entropy": 0.03,
        "ppo/loss/value": 0.05,
        "ppo/val/mean": 0.03,
        "ppo/returns/mean": 0.1,
    }.items():
        assert low[key] == pytest.approx(full[key], abs=atol), key
    difference = low["objective/logprobs"] - full["objective/logprobs"]
    assert 0 < np.abs(difference).max() < 0.15
    assert low["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_float16_on_a_processor_is_refused_before_anything_is_made() -> None:
    with pytest.raises(UsageError, match="precision fp16 needs a CUDA GPU, not cpu"):
        make_trainer(accelerator_kwargs={"mixed_precision": "fp16"})


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["policy.precision=bf16"], "bf16"),
        (["policy.precision=fp32"], "no"),
        (["policy.precision=auto"], "bf16"),
        (["policy.precision=bf16", "ppo.accelerator_kwargs={mixed_precision: no}"], "no"),
        (["policy.precision=fp32", "ppo.accelerator_kwargs={mixed_precision: bf16}"], "bf16"),
        (["policy.precision=fp16"], UsageError),
    ],
    ids=str,
)
def test_the_configurations_precision_reaches_the_trainer_and_accelerates_own_wins(
    assignments: list[str], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ppo_cli.utils.device.computes_bfloat16", lambda _: True)
    settings = ["run.device=cpu", "reward.probe=false", *assignments]
    config = load_config(SMALL_RUN, assignments=settings)
    if expected is UsageError:
        with pytest.raises(UsageError, match="precision fp16 needs a CUDA GPU, not cpu"):
            build_training(config)
    else:
        assert build_training(config).trainer.accelerator.mixed_precision == expected
    assert list(tmp_path.iterdir()) == []
