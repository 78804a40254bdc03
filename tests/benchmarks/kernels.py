"""What each fast path is worth: a whole PPO batch with its switch on and off, in turns.

python tests/benchmarks/kernels.py [--only NAME] [--workload MODEL:BATCH] [--rounds N]

Every figure comes from a process of its own. On is all fast paths, off is all but the one named.
Printed is a Markdown table of medians. A path stays if in one of the rows it takes 5 % off a step
or a batch, or 10 % off peak memory. All of it takes some two hours on two cores. `cuda_graph` needs
a CUDA GPU, `imports` is measured by `ppo-cli generate`.
"""

from __future__ import annotations

import argparse
import ast
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from run import worker

from ppo_cli.kernels.switch import PATHS, VARIABLE
from ppo_cli.utils.device import computes_bfloat16

ROOT = Path(__file__).parent.parent.parent
WORKLOADS = ("gpt2:32", "tiny:128")
LEAST_TIME, LEAST_MEMORY = 0.05, 0.10  # shares that a path has to save
ONE_PRECISION = {"attention": "bf16"}  # in the other it is not taken
GENERATE = ("-m", "ppo_cli", "generate", "embedded", "--prompt", "This movie")
# The code of each path: files, or files with those of their definitions that are its own.
CODE: dict[str, dict[str, tuple[str, ...]]] = {
    "matmul": {"kernels/matmul.py": (), "kernels/patches.py": ()},
    "attention": {"kernels/attention.py": (), "kernels/patches.py": ("_attention",)},
    "lm_head": {"kernels/lm_head.py": ()},
    "tied_embeddings": {"kernels/tied_embeddings.py": ()},
    "packing": {
        "ppo/packing.py": ("packed", "packed_mask", "balanced_rows", "_rows", "_best_fit"),
        "kernels/attention.py": ("block_mask",),
        "models/capabilities.py": ("reads_packed", "reads_block_mask", "_packed_rows"),
    },
    "decode_loop": {"models/decode_loop.py": ()},
    "kv_cache": {"kernels/kv_cache.py": ()},
    "cuda_graph": {
        "kernels/cuda_graph.py": (),
        "models/decode_loop.py": ("_by_replays", "_is_worth_recording", "_StaticStep"),
        "models/capabilities.py": ("reads_static_cache",),
    },
    "optimizer_in_backward": {
        "ppo/optimizer_step.py": ("make_state", "within_backward", "_PartialStep"),
    },
    "kernel_caches": {"kernels/kernel_caches.py": ()},
    "imports": {"cli/fast_imports.py": ()},
    "gelu": {"kernels/gelu.py": ()},
}

Figures = dict[str, float]


def lines_of_code(name: str) -> int:
    """Lines of a path's code that are not blank."""
    return sum(_lines(ROOT / "ppo_cli" / file, own) for file, own in CODE[name].items())


def _lines(path: Path, own: tuple[str, ...]) -> int:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if not own:
        return sum(bool(line.strip()) for line in lines)
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds) and n.name in own]
    if missing := {*own} - {node.name for node in nodes}:
        raise SystemExit(f"{path} has no {', '.join(sorted(missing))}: change CODE")
    parts = [lines[node.lineno - 1 : node.end_lineno] for node in nodes]
    return sum(bool(line.strip()) for part in parts for line in part)


def generate(setting: str) -> Figures:
    """Seconds and peak memory of `ppo-cli generate`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {VARIABLE: setting, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *GENERATE],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"ppo-cli {' '.join(GENERATE[2:])} failed with {VARIABLE}={setting}")
    seconds = time.perf_counter() - started
    return {"step": seconds, "batch": seconds, "peak_mib": usage.ru_maxrss / 1024}


def measure(name: str, workload: str, precision: str, rounds: int) -> tuple[Figures, Figures]:
    """Medians with a path on and with it off."""
    runs: dict[str, list[Figures]] = {"auto": [], f"-{name}": []}
    for _ in range(rounds):
        for setting, figures in runs.items():
            if name == "imports":
                done = generate(setting)
            else:
                model, batch = workload.split(":")
                arguments = ("batch", "ours", model, batch, precision)
                done = worker(sys.executable, *arguments, **{VARIABLE: setting})
            figures.append(done)
            print(f"  {workload} {precision} {setting}: {done}", file=sys.stderr, flush=True)
    on, off = (
        {key: statistics.median(row[key] for row in rows) for key in ("step", "batch", "peak_mib")}
        for rows in runs.values()
    )
    return on, off


def rows_of(name: str, workloads: list[str], rounds: int) -> list[str]:
    """The table's rows of a path."""
    if name == "cuda_graph" and not torch.cuda.is_available():
        return [f"| {name} | {lines_of_code(name)} | not here: no CUDA GPU | | | | | | |"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = ["fp32", "bf16"] if computes_bfloat16(device) else ["fp32"]
    if name in ONE_PRECISION:
        precisions = [each for each in precisions if each == ONE_PRECISION[name]]
    if name == "imports":
        workloads, precisions = ["generate"], ["fp32"]
    rows = []
    for workload in workloads:
        for precision in precisions:
            on, off = measure(name, workload, precision, rounds)
            saved = {key: 1 - on[key] / off[key] for key in on}
            fast = max(saved["step"], saved["batch"]) >= LEAST_TIME
            small = saved["peak_mib"] >= LEAST_MEMORY
            rows.append(
                f"| {name} | {lines_of_code(name)} | {workload} {precision} | "
                f"{on['step']:.3f} / {off['step']:.3f} | {saved['step']:+.1%} | "
                f"{on['batch']:.3f} / {off['batch']:.3f} | {saved['batch']:+.1%} | "
                f"{on['peak_mib']:.0f} / {off['peak_mib']:.0f} ({saved['peak_mib']:+.1%}) | "
                f"{'stays' if fast or small else 'too little'} |"
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", choices=[*PATHS])
    parser.add_argument("--workload", metavar="MODEL:BATCH", action="append", help="gpt2:32, say")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(
        "| path | lines | workload | step s, on / off | saved | batch s, on / off | saved | "
        "peak MiB, on / off | verdict |\n|---|---:|---|---:|---:|---:|---:|---:|---|"
    )
    for name in arguments.only or PATHS:
        rows = rows_of(name, arguments.workload or [*WORKLOADS], arguments.rounds)
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
