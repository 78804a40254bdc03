"""Sampling without the compiler and sharded tensors: the same models, and both there afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_cli.data.embedded import policy_folder

HEAVY = ("torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp")

SAMPLE = """
import json, sys
from contextlib import nullcontext
from ppo_cli.cli.fast_imports import for_sampling_alone

with for_sampling_alone() if sys.argv[1] == "light" else nullcontext():
    from ppo_cli.evaluation import generate
    from ppo_cli.cli import requests
request = requests.resolve([sys.argv[2]], reference=False, score=True, sentiment=None,
                             classifier="embedded", device="cpu", trusted=())
result = generate.generate(
    request.sources[0], ["This movie"], samples_each=3, max_new_tokens=12, seed=1,
    device=request.device, reward=generate.load_classifier(request), trusted=(),
)
found = {"samples": [sample.as_dict() for sample in result.samples], "modules": list(sys.modules)}
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

ALREADY_THERE = """
import json, sys
import transformers.modeling_utils
from ppo_cli.cli.fast_imports import for_sampling_alone

compiler = sys.modules["torch._dynamo"]
with for_sampling_alone():
    asked = transformers.utils.is_torch_distributed_available()
found = {"same": sys.modules["torch._dynamo"] is compiler, "asked": asked}
"""


def found(program: str, *arguments: str) -> dict[str, Any]:
    """What a program finds in an interpreter of its own."""
    code = program + "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_samples_are_the_same_and_compiler_and_shards_come_when_asked_for() -> None:
    light = found(SAMPLE + COMPILE_AFTERWARDS, "light", "embedded")
    plain = found(SAMPLE, "plain", "embedded")
    assert light["samples"] == plain["samples"]
    assert len(light["samples"]) == 3
    assert set(HEAVY) <= set(plain["modules"])
    assert not set(HEAVY) & set(light["modules"])
    assert light["before"] == "_LazyCompiler"
    assert light["compiler"] == "module"
    assert light["same"]
    assert light["compiled"] == [2.0, 2.0]
    assert light["distributed"]
    assert light["tensor"] == "DTensor"


def test_an_adapter_which_asks_for_sharded_tensors_has_them(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(policy_folder())
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(policy_folder()).save_pretrained(tmp_path)
    light, plain = (found(SAMPLE, way, str(tmp_path)) for way in ("light", "plain"))
    assert light["samples"] == plain["samples"]
    assert "torch._inductor" not in light["modules"]


def test_what_torch_has_not_it_still_has_not() -> None:
    program = """
import json, sys
from ppo_cli.cli.fast_imports import for_sampling_alone

with for_sampling_alone():
    import transformers
import torch.distributed
found = {name: hasattr(torch.distributed, name) for name in ("tensor", "nothing", "_nothing")}
"""
    assert found(program) == {"tensor": True, "nothing": False, "_nothing": False}


def test_where_transformers_has_its_compiler_nothing_is_changed() -> None:
    assert found(ALREADY_THERE) == {"same": True, "asked": True}


@pytest.mark.parametrize("name", ["eval_frame", "config", "is_compiling"])
def test_whatever_is_no_decorator_is_the_compilers_own(name: str) -> None:
    program = f"""
import json, sys
from ppo_cli.cli.fast_imports import for_sampling_alone

with for_sampling_alone():
    import transformers
import torch
mine = getattr(torch._dynamo, {name!r})
found = {{"same": mine is getattr(sys.modules["torch._dynamo"], {name!r}),
         "real": type(sys.modules["torch._dynamo"]).__name__}}
"""
    assert found(program) == {"same": True, "real": "module"}
