"""The shape of the code: which module may import which, and that nothing is there unread."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import ppo_cli
from ppo_cli.config import AdapterConfig, RunConfig
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo_settings import PPOSettings

PACKAGE = Path(ppo_cli.__file__).parent

# Data flows down: a module imports only from rows above its own.
ROWS = [
    ["light_import", "embedded", "embedded.grammar", "ppo", "ppo.statistics"],
    ["errors"],
    ["text"],
    [
        "files",
        "random_state",
        "ngrams",
        "ppo_settings",
        "bootstrap",
        "trainer_card",
        "stopping",
        "runtime",
        "attention",
        "cache",
        "context",
        "cuda_graph",
        "feed_forward",
        "value_head",
    ],
    [
        "yaml_io",
        "hub",
        "matmul",
        "activations",
        "ppo.config",
        "ppo.kl_controller",
        "ppo.advantages",
    ],
    ["inventory", "evaluation", "plots", "ppo.calibration", "sources", "tying"],
    ["config", "patches", "ppo.losses", "ppo.learning_rate", "ppo.packing", "quality", "best_of_n"],
    ["config_source", "policy_files", "projection", "summary", "standing", "shaping"],
    ["verdict", "symptoms", "divergence"],
    ["prompts", "architecture", "fingerprint", "advice", "classifier"],
    [
        "policy",
        "run_directory",
        "frontier",
        "adapter",
    ],
    ["decoding", "reward", "reference", "trial"],
    ["rollout"],
    [
        "reward_loading",
        "sampling",
        "potentials",
        "loading",
        "checkpoint",
        "model_card",
        "ppo.experience",
        "saving",
    ],
    ["reward_loading", "ppo.measurements", "ppo.optimizer_step", "likelihoods"],
    ["ppo.update", "ppo.setup"],
    ["ppo.trainer"],
    ["progress", "examination", "preparation"],
    ["training", "generation"],
    ["comparison"],
    ["report"],
    ["comparison_report"],
    ["comparison_page"],
    ["cli", "cli.console", "cli.options", "cli.streams", "cli.requests"],
    ["cli.display"],
    ["cli.train", "cli.generate", "cli.compare", "cli.plot", "cli.stats", "cli.config"],
    ["cli.app"],
    ["__main__", "embedded.build"],
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    del found["__init__"]
    return found


def own_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ppo_cli"):
            base = node.module.removeprefix("ppo_cli").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                names.add(inner if inner in LEVEL else base)
    return names - {""}


def test_every_module_has_its_row() -> None:
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_up(name: str) -> None:
    for imported in own_imports(modules()[name]):
        assert LEVEL[imported] < LEVEL[name], f"{name} imports {imported}"


def config_keys() -> list[str]:
    keys = [f.name for f in dataclasses.fields(PPOConfig)]
    sections: list[type[BaseModel]] = [AdapterConfig]
    sections += [
        field.annotation
        for field in RunConfig.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    assert RunConfig.model_fields["ppo"].annotation is PPOSettings
    for section in sections:
        keys += list(section.model_fields)
    return sorted(set(keys))


# Fields that TRL has for trackers alone: they reach them through `PPOConfig.to_dict`.
FOR_TRACKERS = {
    "exp_name",
    "task_name",
    "query_dataset",
    "reward_model",
    "dataset_num_proc",
    "world_size",
    "is_encoder_decoder",
    "is_peft_model",
    "global_batch_size",
    "global_backward_batch_size",
}


def test_every_configuration_key_is_read_somewhere() -> None:
    sources = {
        name: path.read_text(encoding="utf-8")
        for name, path in modules().items()
        if name not in ("config", "config_source")
    }
    for key in set(config_keys()) - FOR_TRACKERS:
        pattern = re.compile(rf"\.{key}\b")
        assert any(pattern.search(text) for text in sources.values()), key


def test_every_key_is_documented() -> None:
    for section in RunConfig.model_fields.values():
        kind = section.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                assert field.description, f"{kind.__name__}.{name}"


def public_definitions(tree: ast.AST) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions, classes and their methods without a leading underscore; none inside functions."""
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public_definitions(node)
    return found


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_every_public_definition_has_a_docstring(name: str) -> None:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert [d.name for d in public_definitions(tree) if not ast.get_docstring(d)] == []


@pytest.mark.parametrize(
    "module",
    [
        "ppo_cli",
        "ppo_cli.cli.app",
        "ppo_cli.config_source",
        "ppo_cli.comparison_page",
        "ppo_cli.ppo.statistics",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["train", "--sed", "1"], ["trian"], ["--help"]])
def test_what_is_answered_before_a_command_runs_costs_no_validation_library(
    arguments: list[str],
) -> None:
    check = (
        f"import sys; sys.argv = ['ppo-cli', *{arguments}]\n"
        "from ppo_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: sys.exit('pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
