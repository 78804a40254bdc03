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

SAMPLE = f"""
import json, sys
from ppo_cli.cli.fast_imports import light_imports

with light_imports():
    from ppo_cli.evaluation import generate
    from ppo_cli.cli import requests
model = sys.argv[1]
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


def found(program: str, *arguments: str) -> Any:
    """The value `found` of a program that runs in a new interpreter."""
    code = program + "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != VARIABLE},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def samples_here(model: str) -> Any:
    """What `SAMPLE` draws, in this process, where everything is imported plainly."""
    from ppo_cli.cli import requests
    from ppo_cli.evaluation import generate

    names: dict[str, Any] = {"requests": requests, "generate": generate, "model": model}
    exec(DRAW, names)
    return [sample.as_dict() for sample in names["result"].samples]


@pytest.mark.usefixtures("fast_paths")
def test_samples_are_the_same_and_compiler_and_shards_come_when_asked_for() -> None:
    light = found(SAMPLE + COMPILE_AFTERWARDS, "embedded")
    assert light["samples"] == samples_here("embedded")
    assert len(light["samples"]) == 3
    assert not set(HEAVY) & set(light["modules"])
    assert light["before"] == "_LazyCompiler"
    assert light["compiler"] == "module"
    assert light["same"]
    assert light["compiled"] == [2.0, 2.0]
    assert light["distributed"]
    assert light["tensor"] == "DTensor"


@pytest.mark.usefixtures("fast_paths")
def test_an_adapter_which_asks_for_sharded_tensors_has_them(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(policy_folder())
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(policy_folder()).save_pretrained(tmp_path)
    light = found(SAMPLE, str(tmp_path))
    assert light["samples"] == samples_here(str(tmp_path))
    assert "torch._inductor" not in light["modules"]


def test_afterwards_torch_has_what_it_has_and_the_compiler_is_real() -> None:
    program = """
import json, sys
from ppo_cli.cli.fast_imports import light_imports

with light_imports():
    import transformers
import torch.distributed
has = {name: hasattr(torch.distributed, name) for name in ("tensor", "nothing", "_nothing")}
mine = torch._dynamo.eval_frame
found = {"same": mine is sys.modules["torch._dynamo"].eval_frame,
         "real": type(sys.modules["torch._dynamo"]).__name__, **has}
"""
    there = {"tensor": True, "nothing": False, "_nothing": False}
    assert found(program) == {"same": True, "real": "module", **there}


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
