"""Sampling without the compiler and sharded tensors: the same models, and both there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_cli.data.embedded import policy_folder
from ppo_cli.kernels.switch import VARIABLE

HEAVY = ("torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp")

DRAW = """
from ppo_cli.data.rows import Row
request = requests.resolve([model], reference=False, score=True, sentiment=None,
                             classifier="embedded", device="cpu", trusted=())
result = generate.generate(
    request.sources[0], [Row("This movie")], samples_each=3, max_new_tokens=12, seed=1,
    device=request.device, reward=generate.load_classifier(request), trusted=(),
)
"""

IMPORT = """
import json, os, sys
from ppo_cli.cli.fast_imports import light_imports

with light_imports():
    from ppo_cli.evaluation import generate
    from ppo_cli.cli import requests
"""

SAMPLE = f"""
{DRAW}
found = {{"samples": [sample.as_dict() for sample in result.samples], "modules": list(sys.modules)}}
"""

COMPILE_AFTERWARDS = """
import torch, transformers.utils
from torch.distributed.tensor import DTensor

before = type(sys.modules["torch._dynamo"]).__name__
compiled = torch.compile(lambda x: x + 1, backend="eager")
found |= {
    "before": before,
    "compiled": compiled(torch.ones(2)).tolist(),
    "compiler": type(sys.modules["torch._dynamo"]).__name__,
    "same": torch._dynamo is sys.modules["torch._dynamo"],
    "distributed": transformers.utils.is_torch_distributed_available(),
    "tensor": DTensor.__name__,
}
"""


AFTERWARDS = """
import torch.distributed
has = {name: hasattr(torch.distributed, name) for name in ("tensor", "nothing", "_nothing")}
mine = torch._dynamo.eval_frame
found = {"same": mine is sys.modules["torch._dynamo"].eval_frame,
         "real": type(sys.modules["torch._dynamo"]).__name__, **has}
"""

EACH = """
for program in json.loads(sys.argv[1]):
    if os.fork() == 0:
        exec(program)
        print(json.dumps(found), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def output(program: str, *arguments: str) -> list[Any]:
    """The lines of JSON that a program prints in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != VARIABLE},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def found(program: str) -> Any:
    """The value `found` of a program that runs in a new interpreter."""
    [value] = output(program + "\nprint(json.dumps(found))")
    return value


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A folder with an adapter that asks for sharded tensors."""
    folder = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(policy_folder())
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy_folder()).save_pretrained(folder)
    return str(folder)


def light(adapter: str) -> list[Any]:
    """What three programs find, each in a fork of one interpreter after its light imports."""
    programs = [
        "model = 'embedded'" + SAMPLE + COMPILE_AFTERWARDS,
        f"model = {adapter!r}" + SAMPLE,
        AFTERWARDS,
    ]
    return output(IMPORT + EACH, json.dumps(programs))


def samples_here(model: str) -> Any:
    """What `SAMPLE` draws, in this process, where everything is imported plainly."""
    from ppo_cli.cli import requests
    from ppo_cli.evaluation import generate

    names: dict[str, Any] = {"requests": requests, "generate": generate, "model": model}
    exec(DRAW, names)
    return [sample.as_dict() for sample in names["result"].samples]


@pytest.mark.usefixtures("fast_paths")
def test_samples_are_the_same_and_compiler_and_shards_come_when_asked_for(adapter: str) -> None:
    """One test, so that one worker makes what three programs find."""
    sampled, adapted, afterwards = light(adapter)
    assert sampled["samples"] == samples_here("embedded")
    assert len(sampled["samples"]) == 3
    assert not set(HEAVY) & set(sampled["modules"])
    assert sampled["before"] == "_LazyCompiler"
    assert sampled["compiler"] == "module"
    assert sampled["same"]
    assert sampled["compiled"] == [2.0, 2.0]
    assert sampled["distributed"]
    assert sampled["tensor"] == "DTensor"
    # An adapter which asks for sharded tensors has them.
    assert adapted["samples"] == samples_here(adapter)
    assert "torch._inductor" not in adapted["modules"]
    # Afterwards torch has what it has, and the compiler is real.
    there = {"tensor": True, "nothing": False, "_nothing": False}
    assert afterwards == {"same": True, "real": "module", **there}


def test_where_a_release_has_other_internals_all_is_imported_plainly() -> None:
    program = f"""
import json, pathlib, sys
from ppo_cli.cli import fast_imports

fast_imports._unchanged = None  # a decorator that is used in another way
with fast_imports.light_imports():
    from transformers import AutoModelForCausalLM, utils
    from ppo_cli.data.embedded import policy_folder
policy = AutoModelForCausalLM.from_pretrained(policy_folder())
found = {{
    "compiler": type(sys.modules["torch._dynamo"]).__name__,
    "finders": [type(f).__name__ for f in sys.meta_path if "Parts" in type(f).__name__],
    "asked": utils.is_torch_distributed_available(),
    "heavy": [name for name in {HEAVY!r} if name in sys.modules],
    "policy": type(policy) is sys.modules["transformers.models.gpt2.modeling_gpt2"].GPT2LMHeadModel,
}}
"""
    assert found(program) == {
        "compiler": "module",
        "finders": [],
        "asked": True,
        "heavy": list(HEAVY),
        "policy": True,
    }


def test_switched_off_or_with_the_compiler_there_nothing_stands_in() -> None:
    program = """
import json, sys
from ppo_cli.cli.fast_imports import light_imports
from ppo_cli.kernels.switch import using

with using("-imports"), light_imports():
    import transformers.generation.utils
compiler = sys.modules["torch._dynamo"]
found = {"compiler": type(compiler).__name__, "there": "torch.distributed.tensor" in sys.modules}
with light_imports():
    asked = transformers.utils.is_torch_distributed_available()
found |= {"same": sys.modules["torch._dynamo"] is compiler, "asked": asked}
"""
    assert found(program) == {"compiler": "module", "there": True, "same": True, "asked": True}
