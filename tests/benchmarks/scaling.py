"""How cost grows: seconds and memory against batch, response length and model size.

python tests/benchmarks/scaling.py [--output FOLDER]

One axis is varied at a time; a token is one of query or response. Writes scaling.md, scaling.json
and scaling.png to FOLDER. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from run import worker

mpl.use("Agg")
import matplotlib.pyplot as plt

BATCHES = (8, 32, 128, 512)
RESPONSES = (16, 64, 256, 512)
SIZES = {"tiny": 1.1, "6x256": 17.9, "12x512": 64.1, "gpt2": 124.4, "24x1024": 354.8}
AXES: dict[str, list[tuple[float, str, int, int]]] = {
    "batch": [(batch, "tiny", batch, 16) for batch in BATCHES],
    "response length": [(length, "tiny", 32, length) for length in RESPONSES],
    "million parameters": [(millions, name, 16, 16) for name, millions in SIZES.items()],
}


def measure(model: str, batch: int, response: int) -> dict[str, float]:
    """Microseconds a token of each phase, and peak memory."""
    done = worker(
        sys.executable,
        *("batch", "ours", model, str(batch), "fp32"),
        RESPONSE=str(response),
        REPETITIONS="3",
    )
    microseconds = {key: 1e6 * done[key] / done["tokens"] for key in ("sampling", "step")}
    return {**microseconds, "peak_mib": done["peak_mib"]}


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two rows of panels, time above and memory below, an axis a column."""
    figure, panels = plt.subplots(2, len(results), figsize=(11, 5.5), layout="constrained")
    for column, (axis, rows) in enumerate(results.items()):
        x = [row["at"] for row in rows]
        for key in ("sampling", "step"):
            panels[0, column].plot(x, [row[key] for row in rows], marker="o", label=key)
        panels[1, column].plot(x, [row["peak_mib"] for row in rows], marker="o", color="tab:gray")
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [f"{value:.0f}" for value in x])
            panel.set_xticks([], minor=True)
            panel.set_ylim(0, 1.08 * panel.dataLim.ymax)
            panel.grid(alpha=0.3)
            panel.set_xlabel(axis)
    panels[0, 0].set_ylabel("microseconds a token")
    panels[1, 0].set_ylabel("peak memory, MiB")
    panels[0, 0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure each axis; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    lines = ["| axis | at | sampling, us a token | step, us a token | peak MiB |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for axis, points in AXES.items():
        results[axis] = []
        for at, model, batch, response in points:
            row = {"at": at, **measure(model, batch, response)}
            results[axis].append(row)
            lines.append(
                f"| {axis} | {at:g} | {row['sampling']:.0f} | {row['step']:.0f} | "
                f"{row['peak_mib']:.0f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = "\n".join(lines) + "\n"
    (arguments.output / "scaling.md").write_text(table, encoding="utf-8")
    text = json.dumps(results, indent=2) + "\n"
    (arguments.output / "scaling.json").write_text(text, encoding="utf-8")
    draw(results, arguments.output / "scaling.png")
    print(table)


if __name__ == "__main__":
    main()
