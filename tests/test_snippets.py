"""Every command, YAML block and Python block of the documents is what the program takes.

Commands are parsed by the real command tree, and their configurations loaded. Those for which two
small runs are enough are run, in one folder as a reader would. Python blocks run page by page, with
tiny models under the names that the pages use. What is not run says why in `NOT_RUN`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer import Context
from typer.main import get_command

from ppo_cli.cli.app import app
from ppo_cli.config.loading import load_config, shipped_configs
from ppo_cli.config.sweep_loading import load_sweep
from ppo_cli.data.embedded import classifier_folder, policy_folder
from ppo_cli.ppo.statistics import TERM
from tests.conftest import SMALL_RUN
from tests.documents import PAGES, ROOT, Block, Command, blocks, commands
from tests.test_documents import references

POLICY, CLASSIFIER = str(policy_folder()), str(classifier_folder())
STAND_INS = {
    "gpt2": POLICY,
    "Qwen/Qwen2.5-0.5B-Instruct": POLICY,
    "lvwerra/distilbert-imdb": CLASSIFIER,
    "tiny": str(SMALL_RUN),
}
"""Models of the hub and configurations, and what takes their place where Python blocks run."""
TRAINED = "ppo-cli train --sentiment positive --seed 1"
NOT_RUN = {
    r" train ": "one run is enough; the configurations of the others are loaded",
    r" compare .*(--rows 1|--format)": "tests/test_cli.py compares so",
    r"my-chat-run": "needs a run of a chat model; tests/test_chat.py has one",
    r" push .*--private": "uploads; tests/training/test_sharing.py does so to a stand-in",
    r" (plot|runs) sweep-": "needs a sweep; its runs are as others",
    r" plot tiny-0": "needs runs of three seeds; tests/reporting/test_plots.py has some",
    r" runs experiments": "a folder of the reader's",
    r" --reward r.py:short": "tests/test_cli.py scores with a function",
    r"--install-completion": "changes the reader's shell; tests/cli/test_completion.py does so",
    r" sweep ": "many runs; tests/test_sweep.py has a sweep, tests/cli/test_sweep.py all options",
    r"from ray": "Ray is not among the packages of the tests",
}
"""Blocks and commands that are parsed and checked, but not run, and why."""
RUN_ELSEWHERE = {"docs/tutorial.md": "tests/test_tutorial.py runs it, with fewer steps"}
"""Pages whose Python blocks are not run here, and where they are."""
FOREIGN = {
    "num_nodes": "a task of SkyPilot; its command is parsed",
    "command": "a part of a Kubernetes container; its command is parsed",
}
"""First keys of YAML blocks that are no configuration of this tool, and what they are."""
SMALL = {
    "train": [
        *("--steps", "1", "--quiet", "--set", "prompts.limit=32", "--set", "prompts.held_out=4"),
        *("--set", "ppo.batch_size=8", "--set", "ppo.mini_batch_size=8"),
        *("--set", "run.best_of_n=[1,2]"),
    ],
    "compare": ["--samples", "4", "--rows", "1", "--max-new-tokens", "8", "--min-gap", "-9"],
    "generate": ["--max-new-tokens", "4"],
    "init": ["--overwrite"],
}
"""Options that make a command small; later ones win."""
TREE: Any = get_command(app)
COMMANDS = [command for page in PAGES for command in commands(page)]
BLOCKS = [block for page in PAGES for block in blocks(page)]


def reason_not_to_run(text: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), None)


def is_run(command: Command) -> bool:
    is_ours = command.program == "ppo-cli" and command.is_whole
    is_help = command.place.startswith("docs/commands.md")  # what the help shows
    return is_ours and not is_help and reason_not_to_run(command.line) is None


def parsed(command: Command) -> Context:
    """The options of `ppo-cli COMMAND ...` as the program reads them."""
    _, one, rest = TREE.resolve_command(Context(TREE), command.words[1:])
    return one.make_context(one.name, list(rest))


def fault_of(do: Callable[[Command], None], command: Command) -> str:
    """What went wrong; empty where nothing did."""
    try:
        do(command)
    except Exception as error:
        return str(error) or repr(error)
    return ""


def check(command: Command) -> None:
    """Refuse what the program would refuse of a command before it loads a model."""
    if not command.is_whole:  # `ppo-cli export`: a name, not a command line
        _, one, rest = TREE.resolve_command(Context(TREE), command.words[1:])
        known = {name for option in one.params for name in (*option.opts, *option.secondary_opts)}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= {*known, "--help"}
        return
    if command.words[1:] in (["--install-completion"], ["--show-completion"]):
        assert command.words[1] in {name for option in TREE.params for name in option.opts}
        return
    options = parsed(command).params
    name = options.get("config") or options.get("name") or "tiny"
    if name.endswith("run.yaml"):  # of a run that the reader has
        name = "tiny"
    if "assignments" in options and one_of_ours(name):
        load_config(name, assignments=options["assignments"] or ())
    known_metrics = {TERM.sub("NAME", key) for key in references.all_statistics()}
    assert {TERM.sub("NAME", key) for key in options.get("metric") or ()} <= known_metrics


def one_of_ours(name: str) -> bool:
    assert name in shipped_configs() or Path(name).exists(), f"no configuration {name}"
    return True


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader's folder: their files, and two runs that the README's commands have made."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "reviews.csv").write_text("text,review\nA film.,A film.\n")
    (folder / "my.yaml").write_text(
        block_of("docs/configuration.md", "policy:\n  model: gpt2").code
    )
    for file, page in (("rewards.py", "README.md"), ("r.py", "docs/rewards.md")):
        (folder / file).write_text(block_of(page, "def short").code)
    with contextlib.chdir(folder):
        run(next(command for command in COMMANDS if command.line == TRAINED))
        for name in {"ppo-bad", *outputs()} - {"ppo-good", "ppo-notebook"}:  # Python makes the last
            Path(name).symlink_to("ppo-good")
        torch.manual_seed(0)
        language_model = AutoModelForCausalLM.from_pretrained(POLICY)
        adapter = get_peft_model(language_model, LoraConfig(task_type="CAUSAL_LM", r=2))
        adapter.save_pretrained("ppo-good/adapter")
        classifier = AutoModelForSequenceClassification.from_pretrained(
            POLICY, num_labels=1, pad_token_id=0
        )
        get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(
            "my-reward-adapter"
        )
        yield folder


def outputs() -> set[str]:
    """The run directories that commands of the documents make here."""
    found = re.findall(r" train .*--output ([\w-]+)(?=\s|$)", "\n".join(c.line for c in COMMANDS))
    return set(found)


def block_of(page: str, start: str) -> Block:
    return next(b for b in BLOCKS if b.page == ROOT / page and b.code.startswith(start))


def run(command: Command) -> None:
    arguments = [*command.words[1:], *SMALL.get(command.words[1], ())]
    if "--best-of-n" in arguments:
        arguments += ["--best-of-n", "1,2"]
    code = TREE.main(arguments, prog_name="ppo-cli", standalone_mode=False)
    assert code in (None, 0), command


def test_every_command_is_one_that_the_program_takes(workspace: Path) -> None:
    targets = (ROOT / "Makefile").read_text()
    extras = (ROOT / "pyproject.toml").read_text()
    faults = {}
    for command in COMMANDS:
        if command.program == "ppo-cli":
            faults[f"{command.place}: {command.line}"] = fault_of(check, command)
        elif command.program == "make":
            assert re.search(rf"^{command.words[1]}:", targets, re.MULTILINE), command
        else:
            for name in re.findall(r"\[(\w+)\]", command.line):
                assert f"\n{name} = [" in extras, command
    assert {line: fault for line, fault in faults.items() if fault} == {}
    assert sum(command.program == "ppo-cli" for command in COMMANDS) > 80


def test_commands_run(workspace: Path) -> None:
    done: dict[str, str] = {}
    tried: set[tuple[str, str]] = set()
    for command in filter(is_run, COMMANDS):
        new = {(command.words[1], word) for word in command.words[1:] if not word[0].isdigit()}
        if not new <= tried:  # a command whose words have all been run would show nothing new
            tried |= new
            done[command.line] = fault_of(run, command)
    assert {line: fault for line, fault in done.items() if fault} == {}
    assert len(done) > 15


def test_every_reason_is_needed() -> None:
    texts = [command.line for command in COMMANDS if command.is_whole]
    texts += [block.code for block in BLOCKS if block.language == "python"]
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, t) for t in texts)]
    assert unused == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "yml")])
def test_yaml_blocks_are_configurations(block: Block, tmp_path: Path) -> None:
    keys = yaml.safe_load(block.code).keys()
    if next(iter(keys)) in FOREIGN:
        assert "ppo_cli" in block.code
        return
    (tmp_path / "config.yaml").write_text(block.code)
    load = load_sweep if "parameters" in keys else load_config
    load(str(tmp_path / "config.yaml"))


PYTHON = {
    page: [block for block in blocks(page) if block.language == "python"]
    for page in PAGES
    if page.relative_to(ROOT).as_posix() not in RUN_ELSEWHERE
}


@pytest.mark.parametrize(
    "page",
    [page for page, found in PYTHON.items() if found],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(workspace: Path, page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in PYTHON[page]:
        if reason_not_to_run(block.code) is not None:
            continue
        code = block.code
        for name, folder in STAND_INS.items():
            code = code.replace(f'"{name}"', f'"{folder}"')
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)
