"""Two processes with parts of the weights (FSDP2, gloo) do what one with all of them does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_multi_gpu_env,
)
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    BestOfNSampler,
    PPOTrainer,
    TextEnvironment,
)
from ppo_cli.config.loading import load_config
from ppo_cli.errors import UsageError
from ppo_cli.models.capabilities import PADDED_READING
from ppo_cli.models.sharding import is_sharded, local_part
from ppo_cli.ppo import trainer as trainer_module
from ppo_cli.ppo.forward import token_forward
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.sharding import (
    RAM_EFFICIENT,
    check_sharding,
    load_whole_models,
    refuse_unshardable,
    settle_sharding,
)
from ppo_cli.training.build import build_training
from ppo_cli.training.checkpoint import (
    checkpoint_of,
    find_damage,
    load_checkpoint,
    save_checkpoint,
    whole_checkpoint,
)
from ppo_cli.training.export import export_model
from ppo_cli.training.fast_paths import fast_paths
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.shards import is_part
from ppo_cli.utils import processes
from tests.conftest import (
    SMALL_RUN,
    make_gpt2,
    make_policy,
    make_tokenizer,
    make_trainer,
    weights,
)
from tests.models.test_reward_adapter import make_reward_model
from tests.ppo.test_processes import CASES, SIZE, batch_of, learnt
from tests.world import in_world

# Of its cases those are left out that act on scores, advantages and the schedule, where no weights
# are read, and those of which another has all that touches them.
LEFT_OUT = {
    "even", "skewed to the other side", "several mini-batches", "score clip", "absolute KL",
    "whitened rewards", "first scores scale", "adaptive rate", "groups of responses", "schedule",
    "no whitening", "whitening by mini-batch", "score scaling", "KL budget", "potentials",
    "mini-batches of two", "accumulation", "value warm-up by mini-batches",
    "limit of approximate KL", "accumulation of all", "entropy bonus", "value warm-up",
    "methods of 0.11.4",
}  # fmt: skip
NAMES = [name for name in CASES if name not in LEFT_OUT]
CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def fsdp2(**settings: Any) -> dict[str, Any]:
    return {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, **settings)}


def adapted() -> AutoModelForCausalLMWithValueHead:
    """A policy with a new adapter, also of its output layer: the reference is its base."""
    torch.manual_seed(1)
    model = get_peft_model(make_gpt2(), LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead(model, summary_dropout_prob=0.0)


def trained(
    policy: AutoModelForCausalLMWithValueHead, steps: int, **settings: Any
) -> tuple[PPOTrainer, Any]:
    """A trainer after steps of Adam, with a warm-up of one and clipping; then the whole policy."""
    count = processes.count()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=0.01, eps=1e-4, fused=True)
    sizes = {"batch_size": SIZE // count, "mini_batch_size": SIZE // 2 // count}
    warmup = {"value_warmup_steps": min(steps, 1), "max_grad_norm": 0.5}
    trainer = make_trainer(policy, optimizer=adam, **sizes, **warmup, **settings)
    for step in range(steps):
        batch, _ = batch_of({"skewed": True}, step)
        trainer.step(*(part[processes.rows(SIZE)] for part in batch))
    return trainer, trainer.whole_policy()


def state(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Whole weights and moments, and the numbers of steps that the optimizer counted."""
    parts = {f"{i}": p for i, p in enumerate(trainer.model.parameters()) if p.requires_grad}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        parts |= {f"{key} {i}": value for key, value in moments.items()}
    return {
        key: (part.full_tensor() if hasattr(part, "full_tensor") else part).detach().clone()
        for key, part in parts.items()
    }


def restored(folder: Path, trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """What a trainer has after the newest checkpoint in a folder was loaded into it."""
    group = trainer.optimizer.param_groups[0]["params"]
    found = load_checkpoint(whole_checkpoint(folder), trainer.model, group)
    trainer.load_state_dict(found["trainer"])
    moments = trainer.optimizer.state_dict()["state"][0]["exp_avg"]
    assert is_part(moments) == is_sharded(trainer.model)  # not whole in each process
    return state(trainer)


def saved(folder: Path, trainer: PPOTrainer) -> None:
    save_checkpoint(folder, 1, trainer.model, {"trainer": trainer.state_dict()}, keep=1)


def run(output: str, steps: int, resume: bool = False, **accelerator: Any) -> None:
    """Train the embedded models in a run directory; a resumed run has one process."""
    settings = load_config(
        SMALL_RUN,
        assignments=["run.eval_every=1", "run.checkpoint_every=1", f"run.steps={steps}"],
        overrides={("run", "output"): output},
    )
    if accelerator:
        settings.ppo.accelerator_kwargs.update(accelerator)
    training = build_training(settings, resume=resume)
    settings.ppo.accelerator_kwargs.clear()  # run.yaml cannot hold a plugin; launchers give it
    for _ in training.steps():
        pass
    training.finish()
    training.directory.unlock()


def in_shards(home: Path) -> dict[str, Any]:
    """What the tests below compare, from one of two processes."""
    processes.start(120)
    found: dict[str, Any] = {}
    plain, _ = trained(make_policy(), 2, accelerator_kwargs=fsdp2())
    found["saved"] = state(plain)
    saved(home / "shards", plain)
    plain.save_pretrained(home / "model")
    trained_further = plain.step(*(part[processes.rows(SIZE)] for part in batch_of({}, 3)[0]))
    assert trained_further
    found["rolled back"] = restored(home / "shards", plain)
    other, _ = trained(make_policy(seed=1), 0, accelerator_kwargs=fsdp2())
    found["2 -> 2"] = restored(home / "shards", other)
    found["1 -> 2"] = restored(home / "whole", other)

    layers = [m for m in plain.model.modules() if is_sharded(m)]
    parts = [[local_part(p).numel(), p.numel()] for p in plain.model.parameters()]
    reference = [[local_part(p).numel(), p.numel()] for p in plain.ref_model.parameters()]
    found["groups"], found["shares"] = (
        len(layers),
        [
            sum(part for part, _ in model) / sum(whole for _, whole in model)
            for model in (parts, reference)
        ],
    )
    found["fast paths"] = fast_paths(plain)
    # Processes draw different numbers of samples, by transformers' generate as well.
    queries = batch_of({}, 0)[0][0][: 1 + 2 * processes.index()]
    for settings in ({}, {"repetition_penalty": 1.1}):
        with plain.gathered():
            for _ in range(1 + processes.index()):
                plain.generate(queries, max_new_tokens=3, **settings)

    for name, freed in (
        ("new adapter", True),
        ("new adapter, layers kept for the backward pass", False),
    ):
        plugin = fsdp2(reshard_after_forward=freed)
        trainer, whole = trained(adapted(), 3, accelerator_kwargs=plugin)
        found[name] = None if whole is None else weights(whole)
        assert trainer.accelerator.state.fsdp_plugin.reshard_after_forward == freed
        trainer.save_pretrained(home / "adapter")
    found["scores"] = scores_of_an_adapter(home)
    found["texts"] = texts_of_different_numbers(plain.model)
    with pytest.MonkeyPatch.context() as patch:  # it is tried above
        patch.setattr(trainer_module, "check_sampling", lambda *_: "loop")
        for name in NAMES:
            found[name] = learnt(name, **fsdp2())
    plugin = fsdp2(
        auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["Nope"]
    )
    with pytest.raises(UsageError, match=r"cannot be sharded.*Nope"):
        trained(make_policy(), 0, accelerator_kwargs=plugin)
    found["bf16"] = logprobs_in_bfloat16()
    AcceleratorState._reset_state(reset_partial_state=True)
    run(str(home / "run"), 2, **fsdp2())
    found["files"] = sorted(path.name for path in (home / "run").iterdir())
    return found


def scores_of_an_adapter(home: Path) -> torch.Tensor:
    """Scores of a reward adapter after a step, of another number of rows in each process."""
    policy = adapted()
    policy._add_reward_adapter(str(home / "reward"), "reward")
    plugin = fsdp2() if processes.count() > 1 else {}
    trainer, _ = trained(policy, 1, accelerator_kwargs=plugin)
    rows = torch.arange(3, 11).view(2, 4)[: 2 - processes.index()]
    return trainer.model.compute_reward_score(rows)


def texts_of_different_numbers(model: Any) -> list[int]:
    """How many texts a sampler and an environment made; each process has other tasks."""
    count, tokenizer = 1 + processes.index(), make_tokenizer()
    sampler = BestOfNSampler(model, tokenizer, lambda t: [0.0] * len(t), lambda: 2 + count)
    texts = sampler.generate([[5, 6]] * count)
    turns = {"max_turns": count, "generation_kwargs": {"max_new_tokens": 2}}
    environment = TextEnvironment(model, tokenizer, reward_fn=lambda t: [0.0] * len(t), **turns)
    return [len(texts), len(environment.run(["t7 t8"] * count)[1])]


def logprobs_in_bfloat16() -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of a sharded policy in bfloat16, and of the whole in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first precision
    settings = {**fsdp2(), "mixed_precision": "bf16"}
    trainer, policy = trained(make_policy(), 2, accelerator_kwargs=settings)
    (queries, responses, _), _ = batch_of({}, 0)
    tokens = TokenBatch.from_lists(queries, responses, None, 0, torch.device("cpu"))
    with torch.no_grad():
        found = token_forward(trainer.model, tokens).logprobs
        return found, None if policy is None else token_forward(policy, tokens).logprobs


def made_whole(home: Path) -> PPOTrainer:
    """A trainer in one process, saved; beside it a reward adapter."""
    make_gpt2().save_pretrained(home / "base")
    make_reward_model(str(home / "base")).save_pretrained(home / "reward")
    trainer, _ = trained(make_policy(), 2)
    saved(home / "whole", trainer)
    return trainer


def test_two_processes_with_shards_do_what_one_does(tmp_path: Path) -> None:
    """One test, because workers of a suite would each start processes of their own."""
    whole = made_whole(tmp_path)
    shards = in_world(in_shards, tmp_path)
    check_each_process_holds_its_part_of_each_layer(shards)
    check_shards_make_the_update_of_the_whole(shards)
    check_an_adapter_trains_after_a_warm_up_with_its_base_as_reference(shards)
    check_a_reward_adapter_samplers_and_environments_work_in_shards(shards, tmp_path)
    check_weights_and_moments_go_from_any_number_of_processes_to_any(tmp_path, whole, shards)
    check_shards_that_are_missing_changed_or_strange_are_damage(tmp_path)
    check_bfloat16_is_for_products_alone(shards)
    check_what_is_saved_is_whole(tmp_path, shards)
    check_a_sharded_run_is_the_run_of_one_process_that_goes_on(tmp_path, shards)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], value) for key, value in expected.items()
    )


def check_a_reward_adapter_samplers_and_environments_work_in_shards(
    shards: list[dict[str, Any]], home: Path
) -> None:
    expected = scores_of_an_adapter(home)
    for process, rows in zip(shards, (2, 1), strict=True):
        torch.testing.assert_close(process["scores"], expected[:rows], rtol=1e-4, atol=1e-5)
    assert [process["texts"] for process in shards] == [[1, 1], [2, 2]]


def check_each_process_holds_its_part_of_each_layer(shards: list[dict[str, Any]]) -> None:
    assert len(NAMES) >= 15
    for process in shards:
        assert process["groups"] == 3  # two layers, and the rest
        assert all(0.4 < share < 0.6 for share in process["shares"])  # of policy and reference
        assert process["fast paths"]["optimizer_in_backward"] != "used"
        assert process["fast paths"]["cuda_graph"] == "not for sharded weights"
        assert process["fast paths"]["packing"] == "used"


def check_shards_make_the_update_of_the_whole(shards: list[dict[str, Any]]) -> None:
    for name in NAMES:
        update, _ = learnt(name)
        assert update.norm() > 1e-4, name
        assert relative_error(shards[0][name][0], update) <= 1e-5, name


def check_an_adapter_trains_after_a_warm_up_with_its_base_as_reference(
    shards: list[dict[str, Any]],
) -> None:
    policy = adapted()
    start = weights(policy)
    moved = weights(trained(policy, 3)[1]) - start
    for name in ("new adapter", "new adapter, layers kept for the backward pass"):
        assert relative_error(shards[0][name] - start, moved) <= 1e-5, name


def check_weights_and_moments_go_from_any_number_of_processes_to_any(
    home: Path, whole: PPOTrainer, shards: list[dict[str, Any]]
) -> None:
    expected = shards[0]["saved"]
    assert max(relative_error(v, state(whole)[k]) for k, v in expected.items()) < 1e-3
    for process in shards:
        assert equal(process["2 -> 2"], expected)
        assert equal(process["rolled back"], expected)
        assert equal(process["1 -> 2"], state(whole))
    assert equal(restored(home / "shards", trained(make_policy(seed=1), 0)[0]), expected)


def check_shards_that_are_missing_changed_or_strange_are_damage(home: Path) -> None:
    path = checkpoint_of(home / "shards", 1)
    first, second = sorted(path.glob("*.safetensors"))
    content = first.read_bytes()
    first.unlink()
    assert find_damage(path) == f"{first.name} is missing"
    first.write_bytes(content[:-1] + b"?")
    assert find_damage(path) == f"{first.name} has changed since it was written"
    first.write_bytes(content)
    strange = path / second.name.replace("00002", "00003")
    strange.write_bytes(content)
    assert find_damage(path) == f"{strange.name} is not on its list"
    strange.unlink()
    assert find_damage(path) is None


def check_bfloat16_is_for_products_alone(shards: list[dict[str, Any]]) -> None:
    found, exact = shards[0]["bf16"]
    assert 1e-4 < (found - exact).abs().max() < 0.5
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(("name", "count"), [("ddp", 2), ("fsdp2", 2), ("fsdp2-hsdp", 16)])
def test_the_configurations_of_accelerate_ask_for_what_they_say(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0"]
    parsed = launch_command_parser().parse_args([*command, "-m", "ppo_cli", "train"])
    arguments, *_ = _validate_launch_command(parsed)
    assert arguments.num_processes == count
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", str(count))
    assert load_whole_models() is None
    plugin, mesh, _ = check_sharding({})
    assert (plugin is None) == (name == "ddp")
    assert (mesh is not None) == (name == "fsdp2-hsdp")
    if mesh is not None:
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="16 processes, and 2 were started"):
            check_sharding({})


@pytest.mark.parametrize(
    ("settings", "variables", "message"),
    [
        ({"deepspeed_plugin": object()}, {}, "DeepSpeed is not supported.*FSDP2"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported.*FSDP2"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1 is not supported.*fsdp_version to 2"),
        ({"plugin": {}}, {"WORLD_SIZE": "1"}, "there is one process"),
        ({"plugin": {"cpu_offload": True}}, {}, "fsdp_offload_params"),
        ({"plugin": {"activation_checkpointing": True}}, {}, "ppo.gradient_checkpointing"),
        ({"plugin": {"ignored_modules": "v_head"}}, {}, "fsdp_ignored_modules"),
        ({"plugin": {"cpu_ram_efficient_loading": True}}, {}, "fsdp_cpu_ram_efficient_loading"),
        ({"plugin": {}, "mixed_precision": "fp16"}, {}, "fp16.*use bf16"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, {}, "tensor, context and sequence"),
        ({"parallelism_config": ParallelismConfig(dp_shard_size=2)}, {}, "would be sharded"),
    ],
)  # fmt: skip
def test_what_would_not_be_done_rightly_is_refused(
    settings: dict[str, Any],
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in {"WORLD_SIZE": "2", RAM_EFFICIENT: "false", **variables}.items():
        monkeypatch.setenv(key, value)
    if "plugin" in settings:  # made here, because it sets variables
        settings = {**settings, **fsdp2(**settings["plugin"])}
    with pytest.raises(UsageError, match=message):
        check_sharding(settings)


def test_loading_on_the_main_process_alone_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(RAM_EFFICIENT, "true")
    assert "is switched off" in str(load_whole_models())
    assert load_whole_models() is None


def test_models_that_need_different_numbers_of_forward_passes_are_refused() -> None:
    policy = make_policy()
    refuse_unshardable(policy)
    policy.read_as(PADDED_READING._replace(rows="equal"))
    with pytest.raises(UsageError, match=r"cannot be sharded.*lengths apart.*DDP"):
        refuse_unshardable(policy)


def test_sharding_that_accelerate_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = make_trainer().accelerator  # of one process
    with pytest.raises(UsageError, match="was asked for, but accelerate runs without"):
        settle_sharding(accelerator, fsdp2())


def check_what_is_saved_is_whole(home: Path, shards: list[dict[str, Any]]) -> None:
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(home / "model")
    for found, (key, expected) in zip(
        policy.parameters(), list(shards[0]["saved"].items()), strict=False
    ):
        assert torch.equal(found, expected), key
    adapter = load_file(home / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() and value.any() for value in adapter.values())


def check_a_sharded_run_is_the_run_of_one_process_that_goes_on(
    home: Path, shards: list[dict[str, Any]]
) -> None:
    export_model(RunDirectory(home / "run"), home / "exported")
    model = load_file(home / "run" / "model.safetensors")
    exported = load_file(home / "exported" / "model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in model.items())
    run(str(home / "run"), 3, resume=True)
    run(str(home / "one"), 3)
    assert sorted(path.name for path in (home / "one").iterdir()) == shards[0]["files"]
    assert model.keys() == load_file(home / "one" / "model.safetensors").keys()
    rows = [lines(home / name / "metrics.jsonl") for name in ("one", "run")]
    for one, other in zip(*rows, strict=True):
        for key, value in one.items():
            if not key.startswith(("time/", "perf/")):
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    texts = [
        [(row["query"], row["response"]) for row in lines(home / name / "samples.jsonl")]
        for name in ("one", "run")
    ]
    assert texts[0] == texts[1]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
