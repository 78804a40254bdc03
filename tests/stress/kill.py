"""Kills a training run at random instants, resumes each, compares with the uninterrupted run.

make stress                   50 random instants of a run with the default settings
make stress SETTINGS=all KILLS=5   5 of each of the other settings, by what they make a run remember
... --settings rollback,bf16  of these alone
... --writes                  instead before each change of a file or folder in turn
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from safetensors.torch import load_file

from tests.faults import kill_at_write
from tests.forked import Done, ppo_cli, start

RUN = [
    "train", "--seed", 5, "--steps", 12, "--quiet", "--output", "run",
    "--set", "run.checkpoint_every=2", "--set", "ppo.batch_size=16", "--set",
    "ppo.mini_batch_size=16", "--set", "prompts.limit=64", "--set", "prompts.held_out=8",
]  # fmt: skip
Rows = list[dict[str, Any]]


class Setting(NamedTuple):
    """Settings that make a run remember something, and how its metrics show that it does."""

    assignments: list[str]
    shown: Callable[[Rows], bool] = lambda rows: len(rows) == 12


def differ(key: str) -> Callable[[Rows], bool]:
    """Whether a statistic takes more than one value."""
    return lambda rows: len({row[key] for row in rows}) > 1


# The default's learning rate is adaptive, and it scores unfinished texts.
SETTINGS = {
    "adapter": Setting(["policy.adapter.r=4"]),
    "kl": Setting(
        ["ppo.adap_kl_ctrl=true", "ppo.target=0.5", "ppo.horizon=100"], differ("objective/kl_coef")
    ),
    "constant": Setting(["ppo.lr_scheduler_type=constant"], differ("objective/kl")),
    "linear": Setting(
        ["ppo.lr_scheduler_type=linear", "ppo.warmup_steps=3"], differ("ppo/learning_rate")
    ),
    "cosine": Setting(
        ["ppo.lr_scheduler_type=cosine", "ppo.min_lr_ratio=0.1"], differ("ppo/learning_rate")
    ),
    "rollback": Setting(
        [
            "run.kl_limit=2", "ppo.lr_scheduler_type=constant", "ppo.learning_rate=1e-3",
            "run.on_divergence=rollback",
        ],
        lambda rows: len(rows) == 12 and rows[-1]["run/rollbacks"] > 0,
    ),
    "target": Setting(
        ["run.eval_every=2", "run.target_score=-0.2", "ppo.desired_kl=0.1"],
        lambda rows: 2 < len(rows) < 12,
    ),
    "patience": Setting(
        ["run.eval_every=1", "run.patience=2"], lambda rows: 2 < len(rows) < 12
    ),
    "stop-kl": Setting(
        ["run.eval_every=1", "run.stop_kl=0.5", "ppo.desired_kl=0.1"],
        lambda rows: 1 < len(rows) < 12,
    ),
    "accumulation": Setting(["ppo.mini_batch_size=2", "ppo.gradient_accumulation_steps=4"]),
    "epochs": Setting(
        [
            "ppo.ppo_epochs=6", "ppo.mini_batch_size=4", "ppo.max_approx_kl=0.02",
            "ppo.early_stopping=true", "ppo.target_kl=0.05",
        ],
    ),
    "scaling": Setting(
        [
            "ppo.use_score_scaling=true", "ppo.use_score_norm=true", "ppo.score_clip=1.5",
            "ppo.whiten_rewards=true", "ppo.advantage_norm=mini_batch",
        ],
    ),
    "frozen": Setting(["policy.num_shared_layers=2", "ppo.value_warmup_steps=4"]),
    "plain": Setting(
        ["reward.score_every=null", "ppo.responses_per_query=4", "ppo.ent_coef=0.01"]
    ),
    "bf16": Setting(["policy.precision=bf16"]),
}  # fmt: skip
RECORDS = ("metrics.jsonl", "samples.jsonl")
SAME = (
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "run.yaml",
    "ppo-cli.json",
)


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


def kill(name: str, run: list[Any], shown: Callable[[Rows], bool], options: Any) -> int:
    """Kill, resume and compare runs with one setting; how many differ."""
    chance = random.Random(options.seed)
    ways: Counter[str] = Counter()
    reached: Counter[int] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory() as home:
        folders = (Path(home) / str(i) for i in range(10**6))

        def fresh() -> Path:
            folder = next(folders)
            folder.mkdir()
            return folder

        first = fresh()
        done = ppo_cli(*run, cwd=first)
        assert done.code == 0, done.err
        expected = contents(first / "run")
        assert shown(expected["metrics.jsonl"]), f"{name} does not do what it is for"
        began = time.perf_counter()
        ppo_cli(*run, cwd=fresh())
        length = time.perf_counter() - began
        print(f"{name}: the uninterrupted run takes {length:.2f} s", flush=True)
        number = 0
        while options.writes or number < options.kills:
            number += 1
            folder = fresh()
            if options.writes:
                killed = ppo_cli(*run, cwd=folder, fault=partial(kill_at_write, number))
                instant = f"write {number}"
                if killed.code == 0:
                    break  # there are no more writes
            else:
                after = chance.uniform(0, length)
                running = start(*run, cwd=folder)
                time.sleep(after)
                running.process.kill()
                killed = running.wait()
                if killed.code == 0:  # it was quicker than the first
                    number -= 1
                    continue
                instant = f"{after:.3f} s"
            metrics = folder / "run" / "metrics.jsonl"
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            way, done = go_on(folder, run)
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
    print(f"{name}: {sum(ways.values())} kills, {bad} differ; went on by: {dict(ways)}")
    print(f"steps recorded when killed: {dict(sorted(reached.items()))}", flush=True)
    return bad


def main() -> int:
    """Run as described above; 1 where a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writes", action="store_true")
    parser.add_argument(
        "--settings", default="default", help=f"default, all, or names of {', '.join(SETTINGS)}"
    )
    options = parser.parse_args()
    names = list(SETTINGS) if options.settings == "all" else options.settings.split(",")
    known = {"default": Setting([]), **SETTINGS}
    if unknown := set(names) - set(known):
        parser.error(f"no settings named {', '.join(unknown)}: there are {', '.join(known)}")
    bad = 0
    for name in names:
        assignments = [word for a in known[name].assignments for word in ("--set", a)]
        bad += kill(name, [*RUN, *assignments], known[name].shown, options)
    print(f"{len(names)} settings, {bad} runs differ")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
