"""The switch: its values, their precedence, and what `off` means."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import GPT2Model
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerationMixin

import ppo_cli.models.policy as policy_module
import ppo_cli.models.sampling as sampling_module
import ppo_cli.ppo.packing as packing_module
from ppo_cli.errors import UsageError
from ppo_cli.kernels import attention, kernel_caches, kv_cache, matmul, patches
from ppo_cli.kernels.switch import (
    PATHS,
    VARIABLE,
    configured,
    enabled,
    is_enabled,
    reason_off,
    using,
)
from ppo_cli.kernels.tied_embeddings import TiedGradient
from ppo_cli.models import decode_loop
from ppo_cli.ppo import optimizer_step
from tests.conftest import make_batch, make_trainer

ALL = frozenset(PATHS)


def by_environment(question: Callable[[], Any]) -> Any:
    """The answer outside of `using` blocks."""
    return Context().run(question)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", ALL),
        ("auto", ALL),
        ("off", set()),
        ("matmul", {"matmul"}),
        ("matmul, lm_head", {"matmul", "lm_head"}),
        ("-packing,-imports", ALL - {"packing", "imports"}),
        ("packing,matmul,-packing", {"matmul"}),
    ],
)
def test_a_setting_picks_paths(
    setting: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with using(setting):
        assert enabled() == expected
    monkeypatch.setenv(VARIABLE, setting)
    assert by_environment(enabled) == expected
    assert by_environment(lambda: {name for name in PATHS if is_enabled(name)}) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("atention", "there is no fast path 'atention'. Did you mean 'attention'?"),
        ("-atention", "there is no fast path 'atention'. Did you mean 'attention'?"),
        ("zzz", f"there is no fast path 'zzz'. There are {', '.join(PATHS)}."),
        ("auto,-matmul", "there is no fast path 'auto'. auto and off stand alone."),
    ],
)
def test_what_is_no_path_is_refused_in_one_message(setting: str, message: str) -> None:
    with pytest.raises(UsageError) as caught, using(setting):
        pass
    assert str(caught.value) == f"using: {message}"


def test_a_block_goes_before_the_environment_and_that_before_a_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with using("off"), configured("auto"):
        assert enabled() == ALL
    with configured("off"):
        assert enabled() == set()
        assert reason_off() == "switched off (policy.kernels: off)"
    monkeypatch.setenv(VARIABLE, "matmul")
    with using("lm_head"):
        assert enabled() == {"lm_head"}
        with configured("off"):  # leaves the choice as it is
            assert enabled() == {"lm_head"}
    monkeypatch.setenv(VARIABLE, "nothing")
    with pytest.raises(UsageError, match=VARIABLE):
        by_environment(lambda: configured("off"))


def test_a_block_is_for_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    found: list[frozenset[str]] = []
    with using("off"):
        thread = threading.Thread(target=lambda: found.append(enabled()))
        thread.start()
        thread.join()
    assert found == [ALL]


# ---------------------------------------------------------------- what off means


def work() -> None:
    """Sample a batch and train on it, as a run does."""
    trainer = make_trainer()
    queries, _, scores = make_batch()
    responses = trainer.generate(queries, batch_size=8, return_prompt=False, max_new_tokens=3)
    trainer.step(queries, responses, scores)


def test_off_replaces_nothing_and_hooks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = torch.nn.functional
    monkeypatch.setattr(optimizer_step, "LARGE_GRADIENTS", 0)
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: True)

    def state(model: GPT2Model) -> tuple[Any, ...]:
        hooks = [
            hook
            for module in model.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if "transformers" not in hook.__module__  # its own, of hidden states
        ]
        hooks += [p._post_accumulate_grad_hooks for p in model.parameters()]
        functions = functional.linear, torch.addmm, functional.scaled_dot_product_attention
        activations = {type(block.mlp.act).__module__ for block in model.h}
        return functions, {hook for hook in hooks if hook}, activations

    seen: list[Any] = []
    layers: set[type] = set()
    plain, backward = GPT2Model.forward, torch.Tensor.backward

    def forward(self: GPT2Model, *args: Any, **kwargs: Any) -> Any:
        seen.append(state(self))
        output = plain(self, *args, **kwargs)
        layers.update(map(type, getattr(output.past_key_values, "layers", ())))
        return output

    def spy_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append("backward")
        backward(loss, *args, **kwargs)

    generate = MagicMock(side_effect=GenerationMixin.generate, autospec=True)
    monkeypatch.setattr(GPT2Model, "forward", forward)
    monkeypatch.setattr(torch.Tensor, "backward", spy_backward)
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda self, *args, **kwargs: generate(self, *args, **kwargs)
    )
    functions = functional.linear, torch.addmm, functional.scaled_dot_product_attention
    environment = dict(os.environ)
    with using("off"):
        kernel_caches.limit_kernel_caches()
        work()
    assert dict(os.environ) == environment
    assert generate.called
    assert layers == {DynamicLayer}
    assert "backward" in seen
    expected = functions, set(), {"transformers.activations"}
    assert all(each in ("backward", expected) for each in seen)


def test_a_trainer_sets_nothing_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the commands do."""
    for variable in kernel_caches.CACHE_CAPACITIES:
        monkeypatch.delenv(variable, raising=False)
    environment = dict(os.environ)
    work()
    assert dict(os.environ) == environment


# ---------------------------------------------------------------- each path by its name


class Model:
    """A policy on a GPU, with what the decode loop asks of it."""

    device = torch.device("cuda", 0)

    def parameters(self) -> list[torch.Tensor]:
        return []

    def allows(self, question: Callable) -> bool:
        return True


def bfloat16_attention() -> None:
    states = [torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3)]
    with patches.fast_layers():
        torch.nn.functional.scaled_dot_product_attention(*states)


# Path -> where it is entered, and what enters it.
ENTRIES: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "matmul": (matmul, "by_onednn", work),
    "attention": (attention, "short_attention", bfloat16_attention),
    "lm_head": (policy_module, "token_logprobs_and_entropies", work),
    "tied_embeddings": (TiedGradient, "add", work),
    "packing": (packing_module, "balanced_rows", work),
    "decode_loop": (sampling_module, "decode_cached", work),
    "kv_cache": (kv_cache._PreallocatedLayer, "update", work),
    "cuda_graph": (Model, "allows", lambda: decode_loop._is_worth_recording(Model(), 20)),
    "optimizer_in_backward": (optimizer_step._PartialStep, "move", work),
    "kernel_caches": (os.environ, "setdefault", kernel_caches.limit_kernel_caches),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_path_is_taken_where_it_is_on_and_not_where_it_is_off(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_step, "LARGE_GRADIENTS", 0)
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: True)
    monkeypatch.setattr(matmul, "MIN_WEIGHT_SIZE", 0)
    monkeypatch.setattr(patches, "computes_bfloat16", lambda device: True)
    home, function, enter = ENTRIES[name]
    entered: list[str] = []
    plain = getattr(home, function)

    def spy(*args: Any, **kwargs: Any) -> Any:
        entered.append(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(home, function, spy)
    with using(f"-{name}"):
        enter()
    assert not entered
    with using("auto"):
        enter()
    assert entered


def test_every_path_has_such_a_test() -> None:
    elsewhere = {"imports", "gelu"}  # in test files of their own
    assert ENTRIES.keys() | elsewhere == ALL
