"""Times a PPO batch, against TRL 0.11.4 where a Python that has it is given.

python tests/benchmarks/run.py [--peer PYTHON] [--rounds N] [--json FILE] [--large]

Every figure comes from a process of its own. Implementations take turns, A B C A B C, so that a
machine whose speed drifts drifts for all; medians over the rounds and their ratios are printed as a
Markdown table. `--large` adds GPT-2 small with random weights (minutes a round).

A Python with the peer: a virtual environment with `pip install -c constraints.txt torch
transformers` and `pip install trl==0.11.4`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
FIGURES = ("sampling", "step", "batch", "peak_mib")


def measure(python: str, implementation: str, shape: str, batch: int) -> dict[str, float]:
    """One run of the worker."""
    done = subprocess.run(
        [python, str(WORKER), implementation, shape, str(batch)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{implementation} with {python} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all workloads, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="a Python with trl==0.11.4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    workloads = [("tiny", 32), ("tiny", 128)] + ([("gpt2", 32)] if arguments.large else [])
    sides = [(sys.executable, "ppo_cli")]
    if arguments.peer:
        sides += [(arguments.peer, "trl"), (arguments.peer, "trl-batched")]
    results = []
    print("| model | batch | who | sampling s | step s | whole s | peak MiB | whole, TRL / ours |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for shape, batch in workloads:
        runs: dict[str, list[dict[str, float]]] = {name: [] for _, name in sides}
        for _ in range(arguments.rounds):
            for python, name in sides:
                runs[name].append(measure(python, name, shape, batch))
        for name, rows in runs.items():
            median = {key: statistics.median(row[key] for row in rows) for key in FIGURES}
            pairs = zip(rows, runs["ppo_cli"], strict=True)
            ratio = statistics.median(a["batch"] / b["batch"] for a, b in pairs)
            results.append({"model": shape, "batch": batch, "who": name, **median, "ratio": ratio})
            print(
                f"| {shape} | {batch} | {name} | {median['sampling']:.2f} | {median['step']:.2f} | "
                f"{median['batch']:.2f} | {median['peak_mib']:.0f} | {ratio:.2f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
