"""Kills a training run at random instants, resumes each, compares with the uninterrupted run.

make stress            50 random instants
... --writes           instead before each change of a file or folder in turn
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import kill_at_write
from forked import Done, ppo_cli, start
from safetensors.torch import load_file

RUN = [
    "train", "--seed", 5, "--steps", 12, "--quiet", "--output", "run",
    "--set", "run.checkpoint_every=2", "--set", "ppo.batch_size=16", "--set",
    "ppo.mini_batch_size=16", "--set", "prompts.limit=64", "--set", "prompts.held_out=8",
]  # fmt: skip
RECORDS = ("metrics.jsonl", "samples.jsonl")
SAME = ("README.md", "config.json", "generation_config.json", "tokenizer.json", "run.yaml")


def contents(run: Path) -> dict[str, Any]:
    """What a run left behind, without times."""
    found: dict[str, Any] = {}
    for record in RECORDS:
        rows = [json.loads(line) for line in (run / record).read_text().splitlines()]
        found[record] = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows
        ]
    for name in SAME:
        found[name] = (run / name).read_bytes()
    for path in [*run.glob("*.safetensors"), *run.glob("checkpoints/step-*/*.safetensors")]:
        tensors = load_file(path)
        found[str(path.relative_to(run))] = {
            k: (str(v.dtype), tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items()
        }
    for path in run.glob("checkpoints/step-*/state.json"):
        state = json.loads(path.read_text())
        del state["seconds"], state["records"], state["settings"]  # which run.yaml has
        found[str(path.relative_to(run))] = state
    found["names"] = sorted(
        str(p.relative_to(run)) for p in run.rglob("*") if not p.name.startswith(".lock")
    )
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what two runs left behind that is not the same."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def go_on(folder: Path, arguments: list[Any]) -> tuple[str, Done]:
    """Resume as a user would who is told what to do; what it took, and how it ended."""
    done = ppo_cli(*arguments, "--resume", cwd=folder)
    if done.code == 2 and "no such run directory" in done.err:
        return "started anew", ppo_cli(*arguments, cwd=folder)
    if done.code == 2 and "is no run directory" in done.err:
        return "started anew", ppo_cli(*arguments, cwd=folder)
    if done.code == 2 and "no checkpoint" in done.err:
        return "--overwrite", ppo_cli(*arguments, "--overwrite", cwd=folder)
    return "--resume", done


def main() -> int:
    """Run as described above; 1 where a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writes", action="store_true")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    ways: Counter[str] = Counter()
    reached: Counter[int] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        folders = iter(home / str(i) for i in range(10**6))

        def fresh() -> Path:
            folder = next(folders)
            folder.mkdir()
            return folder

        first = fresh()
        done = ppo_cli(*RUN, cwd=first)
        assert done.code == 0, done.err
        expected = contents(first / "run")
        began = time.perf_counter()
        ppo_cli(*RUN, cwd=fresh())
        length = time.perf_counter() - began
        print(f"the uninterrupted run takes {length:.2f} s", flush=True)
        number = 0
        while options.writes or number < options.kills:
            number += 1
            folder = fresh()
            if options.writes:
                killed = ppo_cli(*RUN, cwd=folder, fault=partial(kill_at_write, number))
                instant = f"write {number}"
                if killed.code == 0:
                    break  # there are no more writes
            else:
                after = chance.uniform(0, length)
                running = start(*RUN, cwd=folder)
                time.sleep(after)
                running.process.kill()
                killed = running.wait()
                if killed.code == 0:  # it was quicker than the first
                    number -= 1
                    continue
                instant = f"{after:.3f} s"
            metrics = folder / "run" / "metrics.jsonl"
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            way, done = go_on(folder, RUN)
            ways[way] += 1
            reached[steps] += 1
            unlike = ["exit code"] if done.code else differences(expected, contents(folder / "run"))
            bad += bool(unlike)
            print(
                f"{number:3}: killed at {instant} (code {killed.code}), {steps} steps recorded, "
                f"{way}: {'differs: ' + ', '.join(unlike) if unlike else 'equal'}",
                flush=True,
            )
            if unlike:
                print(done.err, "names:", unlike, flush=True)
    print(f"{sum(ways.values())} kills, {bad} differ; went on by: {dict(ways)}")
    print(f"steps recorded when killed: {dict(sorted(reached.items()))}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
