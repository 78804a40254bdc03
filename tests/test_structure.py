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
from ppo_cli.config.ppo import PPOSettings
from ppo_cli.config.prompts import WeightedSource
from ppo_cli.config.schema import AdapterConfig, QuantizationConfig, RunConfig
from ppo_cli.ppo.config import PPOConfig

PACKAGE = Path(ppo_cli.__file__).parent

# Data flows one way: a package imports only from those before it.
ORDER = [
    "errors",
    "utils",
    "config",
    "data",
    "kernels",
    "models",
    "ppo",
    "core",
    "rewards",
    "evaluation",
    "reporting",
    "training",
    "sweep",
    "cli",
]
LEVEL = {name: level for level, name in enumerate(ORDER)}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    del found["__init__"]
    return found


def own_imports(path: Path) -> set[str]:
    """Packages of this project that a file imports from, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ppo_cli":
            names |= {f"ppo_cli.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names.add(node.module or "")
    inside = {name.split(".")[1] for name in names if name.startswith("ppo_cli.")}
    return {name for name in inside if not name.startswith("__")}


def test_every_package_has_its_place() -> None:
    found = {name.split(".")[0] for name in modules()}
    assert found == {*ORDER, "__main__"}


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_from_those_before_it(package: str) -> None:
    for name, path in modules().items():
        if name.split(".")[0] == package:
            for imported in own_imports(path):
                assert LEVEL[imported] <= LEVEL[package], f"{name} imports {imported}"


def test_a_package_imports_nothing_by_itself() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert own_imports(path) == set(), path


def test_tests_stand_where_the_code_does() -> None:
    tests = Path(__file__).parent
    folders = {path.parent.name for path in tests.glob("*/test_*.py")}
    assert folders <= {*ORDER}


def config_keys() -> list[str]:
    keys = [f.name for f in dataclasses.fields(PPOConfig)]
    sections: list[type[BaseModel]] = [AdapterConfig, QuantizationConfig, WeightedSource]
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
        if not name.startswith("config.")
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


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_public_definition_has_a_docstring(name: str) -> None:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert [d.name for d in public_definitions(tree) if not ast.get_docstring(d)] == []


LIGHT = [
    "ppo_cli", "ppo_cli.config.starting", "ppo_cli.config.loading", "ppo_cli.ppo.statistics",
    "ppo_cli.reporting.comparison_page", "ppo_cli.training.run_list", "ppo_cli.cli.app",
    "ppo_cli.cli.follow", "ppo_cli.sweep.run",
]  # fmt: skip


def test_light_modules_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom importlib import import_module\n"
        f"for module in {LIGHT}:\n"
        "    import_module(module)\n"
        "    heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
