"""The module that a server of forked processes imports: what each would do first, done once.

A short run spends half of its time on imports and on tables that transformers and matplotlib make
at the first model and picture. Nothing here computes gradients, or sets up what is a run's own
(accelerate's state, groups of processes): torch and the run begin these after the fork.
"""

from __future__ import annotations

import gc
import pkgutil
import tempfile
from importlib import import_module
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import ppo_cli
from ppo_cli.data.embedded import classifier_folder, policy_folder
from ppo_cli.reporting.plots import plot_training

MODULES = [
    *(found.name for found in pkgutil.walk_packages(ppo_cli.__path__, "ppo_cli.")),
    "numpy.ctypeslib",
    "tests.conftest",
    "tests.forked",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.profiler._cupti_monitor",
    "typer._click.decorators",
]
for name in MODULES:
    if name != "ppo_cli.__main__":  # which runs the command
        import_module(name)
AutoModelForCausalLM.from_pretrained(policy_folder())
AutoModelForSequenceClassification.from_pretrained(classifier_folder())
AutoTokenizer.from_pretrained(policy_folder())
with tempfile.TemporaryDirectory() as folder:
    rows = [{"step": step, "a": step / 3} for step in (1, 2)]
    plot_training({"run": rows}, Path(folder, "plot.png"), metrics=["a"])
# The collector of a child does not walk through all this, which would also copy its pages.
gc.collect()
gc.freeze()
