"""What a setting does to a run: variants of a configuration over seeds, held against each other.

python study.py VARIANT... --output DIR [--config tiny] [--seeds 1-3] [--sentiments positive]
    [--jobs 2] [--set section.key=value ...]

A VARIANT is `NAME` or `NAME:section.key=value,section.key=value`, changes to the configuration that
all share. Each run is a process of `ppo-cli train`, whose run directory is left in DIR; the table
has means over seeds and sentiments, lowest and highest P, of the closing evaluation, which has
random numbers of its own. STUDY.md has what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

COLUMNS = ("variant", "runs", "P", "P lowest", "score", "KL", "distinct-2", "perplexity")
COLUMNS += ("most common", "seconds")


def main() -> None:
    """Run what is asked for, print a line a run and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--seeds", default="1-3")
    parser.add_argument("--sentiments", default="positive")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="shared")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    runs = [
        (name, sentiment, seed, arguments.shared + [s for s in changes.split(",") if s])
        for name, _, changes in (variant.partition(":") for variant in arguments.variants)
        for sentiment in arguments.sentiments.split(",")
        for seed in range(int(first), int(last or first) + 1)
    ]
    threads = max((os.cpu_count() or 1) // arguments.jobs, 1)

    def train(run: tuple[str, str, int, list[str]]) -> tuple[str, dict[str, Any]]:
        name, sentiment, seed, changes = run
        folder = arguments.output / f"{name}-{sentiment}-{seed}"
        command = [sys.executable, "-m", "ppo_cli", "train", "--config", arguments.config]
        command += ["--sentiment", sentiment, "--seed", str(seed), "--output", str(folder)]
        command += ["--overwrite", "--quiet", "--json"]
        for change in changes:
            command += ["--set", change]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        found = measures(json.loads(done.stdout))
        said = " ".join(done.stderr.split())
        print(json.dumps({"run": folder.name, **found, "said": said}), flush=True)
        return name, found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(train, runs))
    print("\n| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1))
    for name in dict.fromkeys(name for name, _ in results):
        rows = [found for other, found in results if other == name]
        mean = {key: fmean(row[key] for row in rows) for key in rows[0]}
        cells = [name, str(len(rows)), f"{mean['P']:.3f}", f"{min(r['P'] for r in rows):.3f}"]
        cells += [f"{mean['score']:.2f}", f"{mean['KL']:.1f}", f"{mean['distinct-2']:.2f}"]
        cells += [f"{mean['perplexity']:.2f}", f"{mean['most common']:.3f}"]
        print("| " + " | ".join([*cells, f"{mean['seconds']:.0f}"]) + " |")


def measures(summary: dict[str, Any]) -> dict[str, float]:
    """Of a run's summary; distinct-2 and perplexity over those of the reference."""
    before, after = summary["before"], summary["after"]
    return {
        "P": after["probability"],
        "score": after["score"],
        "KL": after["kl"],
        "distinct-2": after["distinct_2"] / before["distinct_2"],
        "perplexity": after["perplexity"] / before["perplexity"],
        "most common": after["most_common"],
        "seconds": summary["seconds"],
    }


if __name__ == "__main__":
    main()
