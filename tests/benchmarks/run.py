"""Times PPO batches against TRL 0.11.4, and says how close to the machine's limit they come.

python tests/benchmarks/run.py --peer PYTHON [--short] [--only MODEL:BATCH] [--rounds N]

PYTHON has trl==0.11.4 beside the same torch and transformers; without it only our own figures are
measured. Every figure comes from a process of its own; those that are compared take turns, A B A B,
so that a machine whose speed drifts drifts for all. Printed are medians, and medians of the ratios
within a round. `--short` takes under three minutes: the tutorial's loop alone, without GPT-2 at
batch 128. The whole takes half an hour to three quarters on two cores.

Writes results.json and results.md to the folder that --output names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
LOOP, BEST = ("trl", "fp32"), ("trl-batched", "bf16")
FIGURES = ("sampling", "step", "batch", "tokens", "step_gflop", "peak_mib")
# model, batch -> the goals that concern it: ours, figure, peer, ratio to reach.
Goal = tuple[str, str, tuple[str, str], float]
WORKLOADS: dict[tuple[str, int], list[Goal]] = {
    ("gpt2", 32): [
        ("fp32", "batch", LOOP, 3.5),
        ("bf16", "batch", LOOP, 7.0),
        ("fp32", "step", LOOP, 2.5),
        ("bf16", "step", LOOP, 5.5),
        ("bf16", "batch", BEST, 3.3),
        ("fp32", "peak_mib", LOOP, 1 / 0.65),
        ("bf16", "peak_mib", LOOP, 1 / 0.65),
    ],
    ("gpt2", 128): [("fp32", "batch", LOOP, 3.5), ("bf16", "batch", LOOP, 8.0)],
    ("tiny", 128): [
        ("fp32", "batch", LOOP, 9.0),
        ("fp32", "batch", ("trl-batched", "fp32"), 2.3),
    ],
}
START_UPS = {
    "ppo-cli --help": (["-m", "ppo_cli", "--help"], "import typer, rich"),
    "a mistyped option": (["-m", "ppo_cli", "train", "--sed", "1"], "import typer, rich"),
    "ppo-cli generate embedded": (
        ["-m", "ppo_cli", "generate", "embedded", "--prompt", "This movie"],
        "import torch; from transformers import AutoModelForCausalLM",
    ),
}


def worker(python: str, *arguments: str, **environment: str) -> dict[str, float]:
    """One run of the worker."""
    done = subprocess.run(
        [python, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arguments} with {python} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def workload(
    model: str, batch: int, goals: list[Goal], peer: str | None, rounds: int, **environment: str
) -> dict[str, Any]:
    """All sides of a workload, in turns: their medians, and the ratios that the goals name."""
    sides = [("ours", precision) for precision in dict.fromkeys(goal[0] for goal in goals)]
    peers = list(dict.fromkeys(goal[2] for goal in goals)) if peer else []
    runs: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in peers + sides}
    for _ in range(rounds):
        for who, precision in runs:
            python = sys.executable if who == "ours" else str(peer)
            done = worker(python, "batch", who, model, str(batch), precision, **environment)
            runs[who, precision].append(done)
            print(f"  {model} {batch} {who} {precision}: {done}", file=sys.stderr, flush=True)
    ratios = []
    for precision, figure, against, goal in goals if peer else []:
        pairs = zip(runs[against], runs["ours", precision], strict=True)
        ratio = statistics.median(theirs[figure] / ours[figure] for theirs, ours in pairs)
        ratios.append([precision, figure, " ".join(against), goal, ratio])
    medians = {
        " ".join(side): {key: statistics.median(row[key] for row in rows) for key in FIGURES}
        for side, rows in runs.items()
    }
    return {"model": model, "batch": batch, "medians": medians, "ratios": ratios}


def native(goals: list[Goal], peaks: dict[str, float]) -> list[Goal]:
    """The goals in precisions that the processor has units for: emulated ones take minutes."""
    return [goal for goal in goals if goal[0] in peaks and goal[2][1] in peaks]


def start_up(arguments: list[str], base: str, rounds: int) -> tuple[float, float]:
    """Median seconds of a command and of the imports that it is held against.

    Both with their bytecode cached, as an installation has it.
    """
    cached = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def seconds(command: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=False, env=cached)
        return time.perf_counter() - started

    pairs = [(seconds(arguments), seconds(["-c", base])) for _ in range(rounds + 1)][1:]
    ours, theirs = zip(*pairs, strict=True)
    return statistics.median(ours), statistics.median(theirs)


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    peaks = results["peak"]
    bf16 = f"{peaks['bf16']:.0f} bfloat16" if "bf16" in peaks else "no bfloat16 units"
    lines = [
        f"Matrix products: {peaks['fp32']:.0f} GFLOP/s float32, {bf16}.",
        "",
        "| model | batch | who | sampling s | step s | whole s | peak MiB | of the peak |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for result in results["workloads"]:
        for who, m in result["medians"].items():
            share = m["step_gflop"] / m["step"] / peaks[who.rpartition(" ")[2]]
            lines.append(
                f"| {result['model']} | {result['batch']} | {who} | {m['sampling']:.2f} | "
                f"{m['step']:.2f} | {m['batch']:.2f} | {m['peak_mib']:.0f} | {share:.2f} |"
            )
    lines += ["", "| model | batch | ours | figure | against | goal | ratio |"]
    lines += ["|---|---:|---|---|---|---:|---:|"]
    for result in results["workloads"]:
        for precision, figure, against, goal, ratio in result["ratios"]:
            lines.append(
                f"| {result['model']} | {result['batch']} | {precision} | {figure} | {against} | "
                f"{goal:.1f} | **{ratio:.2f}** |"
            )
    lines += ["", "| command | s | imports s | ratio (goal 1.5) |", "|---|---:|---:|---:|"]
    for name, (ours, theirs) in results["start_ups"].items():
        lines.append(f"| {name} | {ours:.3f} | {theirs:.3f} | **{ours / theirs:.2f}** |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="a Python with trl==0.11.4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", metavar="MODEL:BATCH", action="append", help="gpt2:32, say")
    parser.add_argument("--output", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    rounds = 1 if arguments.short else arguments.rounds
    wanted = arguments.only or [f"{model}:{batch}" for model, batch in WORKLOADS]
    chosen = {key: WORKLOADS[key] for key in WORKLOADS if f"{key[0]}:{key[1]}" in wanted}
    environment = {}
    if arguments.short:
        chosen.pop(("gpt2", 128), None)
        chosen = {key: [goal for goal in goals if goal[2] == LOOP] for key, goals in chosen.items()}
        environment["REPETITIONS"] = "2"
    peaks = [worker(sys.executable, "peak") for _ in range(rounds)]
    workloads = [
        workload(model, batch, native(goals, peaks[0]), arguments.peer, rounds, **environment)
        for (model, batch), goals in chosen.items()
    ]
    peaks.append(worker(sys.executable, "peak"))  # a busy moment before would make shares too large
    results = {
        "peak": {key: max(peak[key] for peak in peaks) for key in peaks[0]},
        "workloads": workloads,
        "start_ups": {name: start_up(*pair, rounds) for name, pair in START_UPS.items()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (arguments.output / "results.json").write_text(text, encoding="utf-8")
    table = markdown(results)
    (arguments.output / "results.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
