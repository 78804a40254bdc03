"""Messages name the thing, the place where it was set, and a remedy for this command."""

from __future__ import annotations

import errno
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from ppo_cli.config.loading import load_config
from ppo_cli.errors import (
    ConfigError,
    MissingPackageError,
    ModelError,
    PPOCliError,
    UsageError,
    is_out_of_memory,
)
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.utils.hub import loading_errors, trial_errors
from ppo_cli.utils.model_checks import refuse_nan
from tests.conftest import make_gpt2, make_policy, make_tokenizer, make_trainer
from tests.test_bad_input import run_here  # noqa: F401

Run = Callable[[list[str], Path], tuple[int, str, str]]


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (["rollout.output_max_length=2"], "--set rollout.output_max_length=2: "),
        (["rollout.output_min_length=99"], "--set rollout.output_min_length=99: "),
        (
            ["rollout.output_min_length=5", "rollout.output_max_length=3"],
            "--set rollout.output_max_length=3: ",
        ),
        (["rollout={output_max_length: 2, output_min_length: 4}"], "--set rollout={output_max"),
        (["ppo.mini_batch_size=7"], "--set ppo.mini_batch_size=7: "),
        (["ppo.kl_in_loss=true"], "--set ppo.kl_in_loss=true: "),
        (["run.target_score=1", "run.eval_every=0"], "--set run.eval_every=0: "),
    ],
)
def test_a_rule_between_keys_names_the_one_that_was_set_last(
    settings: list[str], place: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", assignments=settings)
    assert str(caught.value).startswith(place)


def test_a_rule_between_keys_names_a_files_line_or_an_option(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("rollout:\n  output_max_length: 3\n  top_k: 0\n  output_min_length: 5\n")
    with pytest.raises(ConfigError, match=r"own\.yaml, line 4: rollout: output_max_length \(3\)"):
        load_config(str(file))
    file.write_text("run:\n  target_score: 1\n")
    overrides = {("run", "eval_every"): 0}
    with pytest.raises(ConfigError, match=r"^option --eval-every: run: target_score"):
        load_config(str(file), overrides=overrides)


NO_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ImportError("libtorch.so: failed to map segment from shared object: Cannot allocate memory"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_lack_of_memory_is_called_that_while_a_model_is_loaded(error: Exception) -> None:
    wrapped = OSError("Unable to load weights from checkpoint file")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        assert is_out_of_memory(raised)
        for around in (loading_errors, trial_errors):
            with pytest.raises(ModelError, match="org/x: out of memory") as caught, around("org/x"):
                raise raised
            assert "save" not in str(caught.value)
    assert not is_out_of_memory(ValueError("odd"))


@pytest.mark.parametrize(
    ("arguments", "where", "wanted"),
    [
        (["train"], "ppo_cli.config.loading.load_config", "ppo.mini_batch_size"),
        (["generate", "x"], "ppo_cli.cli.requests.resolve", "--max-new-tokens"),
        (["compare", "x", "y"], "ppo_cli.cli.requests.resolve", "--samples"),
        (["stats", "x"], "ppo_cli.training.run_directory.RunDirectory.existing", "other programs"),
        (["plot", "x"], "ppo_cli.training.run_directory.RunDirectory.existing", "other programs"),
    ],
)
def test_each_command_has_its_own_advice_where_memory_ends(
    arguments: list[str],
    where: str,
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here: Run,  # noqa: F811
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(where, fail)
    code, _, stderr = run_here(arguments, tmp_path)
    assert code == 1 and "error: out of memory: " in stderr and wanted in stderr
    assert ("ppo.mini_batch_size" in stderr) == (arguments[0] == "train")


def test_a_model_whose_numbers_overflow_is_named_without_a_word_of_training(
    tmp_path: Path,
    run_here: Run,  # noqa: F811
) -> None:
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "huge")
    make_tokenizer().save_pretrained(tmp_path / "huge")
    arguments = ["generate", "huge", "--no-score", "--prompt", "t1 t2", "--max-new-tokens", "2"]
    code, _, stderr = run_here(arguments, tmp_path)
    assert code == 1 and "\nerror: huge: its probabilities are not finite" in stderr
    assert "update" not in stderr and "learning_rate" not in stderr


def test_nan_is_looked_for_in_weights_and_infinity_is_none() -> None:
    policy = make_policy()
    refuse_nan("x", policy)
    with torch.no_grad():
        bias = policy.pretrained_model.transformer.h[1].ln_1.bias
        bias[2] = float("inf")
        bias[3] = float("-inf")
        refuse_nan("x", policy)
        bias[3] = float("nan")
    with pytest.raises(ModelError, match=r"^x: .* transformer\.h\.1\.ln_1\.bias holds NaN"):
        refuse_nan("x", policy)


@pytest.mark.parametrize("modules", [["nosuch"], "no.*such", []])
def test_what_peft_refuses_names_the_key_and_the_models_modules(modules: Any) -> None:
    settings = LoraConfig(target_modules=modules)
    with pytest.raises(UsageError, match=r"policy\.adapter\.target_modules\), of c_attn, c_fc"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_gpt2(), peft_config=settings)


@pytest.mark.parametrize("name", ["wandb", "comet_ml"])
def test_a_trackers_missing_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    (tmp_path / name).mkdir()  # a folder that the tracker left is no package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=rf"pip install 'ppo-cli\[{name}\]'") as caught:
        make_trainer(log_with=[name])
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, PPOCliError)


def test_a_tracker_needs_a_folder_and_arguments_of_its_own(tmp_path: Path) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("the package tensorboard is not installed")
    with pytest.raises(UsageError, match=r"ppo\.project_kwargs=\{logging_dir: FOLDER\}"):
        make_trainer(log_with="tensorboard")
    folder = {"logging_dir": str(tmp_path / "logs")}
    with pytest.raises(UsageError, match="'wandb' is not the tracker"):
        make_trainer(
            log_with="tensorboard", project_kwargs=folder, tracker_kwargs={"wandb": {"tags": []}}
        )
    trainer = make_trainer(
        log_with="tensorboard", project_kwargs=folder, tracker_project_name="mine"
    )
    trainer.log_stats({"loss": 1.0}, {}, [torch.tensor(1.0)])
    assert any((tmp_path / "logs" / "mine").glob("events*"))
    (tmp_path / "logs" / "file").touch()
    with pytest.raises(PPOCliError, match=r"the tracker does not start: .*"):
        make_trainer(
            log_with="tensorboard", project_kwargs=folder, tracker_project_name="file/deep"
        )


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("accelerator_kwargs", {"split_batchs": True}, "Did you mean 'split_batches'"),
        ("accelerator_kwargs", {"log_with": "wandb"}, "there is no 'log_with'"),
        ("accelerator_kwargs", {"dynamo_backend": 5}, "accelerator_kwargs: "),
        ("project_kwargs", {"loging_dir": "x"}, "Did you mean 'logging_dir'"),
    ],
)
def test_mistyped_arguments_of_accelerate_are_named(
    key: str, given: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(UsageError, match=wanted):
        make_trainer(**{key: given})
