"""Many runs beside each other on one machine: which default suits every classifier.

python study_defaults.py INPUTS OUT [--seconds 480] [--cpu-workers 13] [--gpu-workers 4]

INPUTS holds the reviews' models, a classifier with three labels made of theirs, and texts (see
STUDY.md). Each run is a line of OUT/results.jsonl as soon as it ends, and each step one of
OUT/steps/NAME.jsonl; what is not done after --seconds is dropped. Runs of the embedded models go to
the processor, one thread each; those of the reviews to the GPU, or where there is none to the
processor, too. Once the list is through, the best candidates are run again with other seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

COMMON = ["ppo.use_score_scaling=true", "ppo.score_scaling_samples=256", "run.eval_every=32"]
COMMON += ["run.checkpoint_every=0", "run.samples_per_step=1", "run.kl_limit=60"]
EMAS = (0.95, 0.98)

# name -> changes; `c` is the KL coefficient relative to the scores' spread
CANDIDATES: dict[str, list[str]] = {
    "raw": ["ppo.use_score_scaling=false", "ppo.init_kl_coef=0.05", "run.kl_ceiling=null"],
    **{
        f"c{c}": [f"ppo.init_kl_coef={c}", "run.kl_ceiling=null"]
        for c in (0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4)
    },
    "top": [],  # the configuration as it is
    **{
        f"kl{n}": [f"run.kl_budget={n}", "ppo.init_kl_coef=0.1"]
        for n in (1.5, 2, 2.3, 2.5, 3, 4, 5)
    },
}
VARIANTS: dict[str, list[str]] = {
    "d.015": ["ppo.desired_kl=0.015"],
    "d.008": ["ppo.desired_kl=0.008"],
    "d.005": ["ppo.desired_kl=0.005"],
    "d.003": ["ppo.desired_kl=0.003"],
    "d.002": ["ppo.desired_kl=0.002"],
    "d.0007": ["ppo.desired_kl=0.0007"],
    "epochs1": ["ppo.ppo_epochs=1"],
    "epochs4": ["ppo.ppo_epochs=4"],
    "batch256": ["ppo.batch_size=256", "run.steps=64"],
    "mini128": ["ppo.mini_batch_size=128"],
    "lam.7": ["ppo.lam=0.7"],
    "lam.8": ["ppo.lam=0.8"],
    "lam.97": ["ppo.lam=0.97"],
    "every1": ["reward.score_every=1"],
    "four": ["ppo.responses_per_query=4"],
    "no-norm": ["ppo.advantage_norm=none"],
    "steps192": ["run.steps=192"],
    "steps256": ["run.steps=256"],
    "running": ["ppo.score_scaling_samples=null"],
    "wide": ["ppo.batch_size=256", "ppo.ppo_epochs=1", "run.steps=96"],
    "warmup": ["ppo.warmup_steps=8"],
    "anneal": [],  # a budget of twice as much that falls to its end over 60 % of the run
    "grow": [],  # a budget that grows from a quarter of it over half the run
    "vf.1": ["ppo.vf_coef=0.1"],
}
CPU = [
    "em top", "em top", "emn top", "emp top", "em top", "emn top", "em kl1.5", "em kl5", "emp top",
    "em top+d.015", "emn top", "em top+steps192", "em top+every1",
]  # fmt: skip
GPU = [
    "rv top", "rvp top", "rv3 top", "rv top+steps256", "rv top", "sh kl3", "sh kl5", "rv kl3",
    "rvp top", "rv3 top", "rv top", "rv top+d.005", "rv top+every1", "rv top+lam.8",
]  # fmt: skip


def settings(task: str, inputs: Path) -> tuple[str, list[str]]:
    """Configuration and changes of `CLASSIFIER CANDIDATE[+VARIANT]`."""
    kind, candidate = task.split(" ")
    base, *variants = candidate.split("+")
    changes = [*COMMON, *CANDIDATES.get(base, [])]
    for variant in variants:
        changes += VARIANTS[variant]
    if kind == "emn":
        changes.append("reward.sentiment=negative")
    if kind[-1] == "p":
        changes.append("reward.output=probability")
    if kind[:2] == "em":
        return "tiny", changes
    classifier = "three-labels" if kind == "rv3" else "distilbert-imdb"
    changes += [f"policy.model={inputs / 'gpt2-imdb'}", f"reward.model={inputs / classifier}"]
    changes += [f"prompts.source={inputs / 'imdb.csv'}", "prompts.held_out=512"]
    if kind == "sh":
        changes += ["prompts.subset=null", "prompts.split=train", "run.steps=200"]
        return "gpt2-imdb-shaped", changes
    return "tiny", changes


def run(task: str, seed: int, inputs: Path, out: Path, device: str) -> dict[str, Any]:
    """One run -> what it measured, with the random numbers of no evaluation."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from ppo_cli.cli.console import hush
    from ppo_cli.config.loading import load_config
    from ppo_cli.ppo.kl_controller import BudgetKLController
    from ppo_cli.training.build import build_training

    started = time.perf_counter()
    hush()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # that of the worker's run before
    GradientState._reset_state()
    name = f"{task.replace(' ', '-')}-{seed}"
    config, changes = settings(task, inputs)
    changes += [f"run.output=/tmp/study-runs/{name}", f"run.seed={seed}", f"run.device={device}"]
    training = build_training(load_config(config, assignments=changes), overwrite=True)
    result: dict[str, Any] = {"task": task, "seed": seed, "device": device}
    if task.endswith(" bon"):
        curve = training.held_out.best_of_n([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])
        training.directory.unlock()
        points = [(point.n, point.kl, point.score) for point in curve.points]
        return {**result, "curve": points, "seconds": time.perf_counter() - started}
    policy = training.trainer.accelerator.unwrap_model(training.trainer.model)
    weights = dict(policy.named_parameters())
    start = {key: value.detach().clone() for key, value in weights.items()}
    averages = {decay: {k: v.clone() for k, v in start.items()} for decay in EMAS}
    controller, budget = training.trainer.kl_ctl, training.config.run.kl_budget
    with (out / "steps" / f"{name}.jsonl").open("a") as steps:
        for report in training.steps():
            if isinstance(controller, BudgetKLController) and budget is not None:
                progress = report.step / report.steps
                if "anneal" in task:
                    controller.budget = budget * (1 + max(1 - progress / 0.6, 0.0))
                elif "grow" in task:
                    controller.budget = budget * min(0.25 + 1.5 * progress, 1.0)
            kept = {k: round(v, 4) for k, v in report.stats.items() if k in KEPT or "eval/" in k}
            steps.write(json.dumps({"step": report.step, **kept}) + "\n")
            steps.flush()
            with torch.no_grad():
                for decay, average in averages.items():
                    for key, value in weights.items():
                        average[key].lerp_(value, 1 - decay)
    result |= {"train_seconds": training.state.seconds, "step": training.step}
    result["score_scale"] = training.trainer.running.std
    last = {key: value.detach().clone() for key, value in weights.items()}
    others = {"last": last, "ema0.95": averages[0.95]}
    seed_of_variants = 12345
    before = training.held_out.of_reference(seed_of_variants).quality.values
    for other, values in others.items():
        with torch.no_grad():
            for key, value in weights.items():
                value.copy_(values[key])
        result[other] = measures(
            training.held_out.of_policy(seed_of_variants).quality.values, before
        )
    with torch.no_grad():
        for key, value in weights.items():
            value.copy_(last[key])
    training.state.save()
    chosen = training.state.load_chosen_weights(training.state.evaluations)
    reference, tuned = training.held_out.close()
    training.directory.unlock()
    result["chosen"] = measures(tuned.quality.values, reference.quality.values)
    result |= {"chosen_step": chosen.step, "before": before, "coef": training.trainer.kl_ctl.value}
    return {**result, "seconds": time.perf_counter() - started}


KEPT = {
    "objective/kl", "objective/kl_coef", "env/reward_mean", "env/reward_std", "ppo/learning_rate",
    "env/probability_mean", "ppo/policy/approxkl", "tokens/responses_len_mean", "time/step",
    "ppo/policy/entropy", "ppo/val/var_explained",
}  # fmt: skip


def measures(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Measures of a model, variety, fluency and length over those of the reference."""
    found = {"P": after["probability"], "score": after["score"], "KL": after["kl"]}
    for key in ("distinct_2", "perplexity", "length"):
        found[key] = after[key] / before[key]
    return {key: round(value, 4) for key, value in found.items()}


def promise(result: dict[str, Any]) -> float:
    """How good a candidate is on the embedded models: little KL at a P of 0.95 and more."""
    found = result["chosen"]
    short = max(0.95 - found["P"], 0.0)
    return float(found["KL"] + 100 * short)


def main() -> None:
    """Run the list, then the best again, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--cpu-workers", type=int, default=13)
    parser.add_argument("--gpu-workers", type=int, default=4)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    (arguments.out / "steps").mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("spawn")
    pools = {"cpu": ProcessPoolExecutor(arguments.cpu_workers, mp_context=context)}
    device_of_reviews = "cpu"
    if arguments.gpu_workers:
        pools["cuda"] = ProcessPoolExecutor(arguments.gpu_workers, mp_context=context)
        device_of_reviews = "cuda"
    pending: dict[Future[dict[str, Any]], tuple[str, int, str]] = {}
    count: dict[str, int] = {}

    def submit(task: str, device: str) -> None:
        seed = count[task] = count.get(task, 0) + 1
        work = pools[device].submit(
            run, task, seed, arguments.inputs.resolve(), arguments.out.resolve(), device
        )
        pending[work] = (task, seed, device)

    for task in GPU:
        if arguments.only in task:
            submit(task, device_of_reviews)
    for task in CPU:
        if arguments.only in task:
            submit(task, "cpu")
    finished: list[dict[str, Any]] = []
    while pending and time.monotonic() < ends:
        done, _ = wait(
            pending, timeout=max(ends - time.monotonic(), 0), return_when=FIRST_COMPLETED
        )
        for work in done:
            task, seed, device = pending.pop(work)
            try:
                result = work.result()
                finished.append(result)
            except Exception as error:  # the others go on
                fault = "".join(traceback.format_exception(error))[-1500:]
                result = {"task": task, "seed": seed, "error": fault}
            with (arguments.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            chosen = json.dumps(result.get("chosen", result.get("error", result.get("curve"))))
            print(f"{arguments.seconds - (ends - time.monotonic()):.0f} s: {task}", seed, chosen)
            sys.stdout.flush()
            waiting = sum(not f.running() for f, (*_, d) in pending.items() if d == device)
            if not arguments.only and not waiting:
                submit_again(finished, count, submit, device)
    print(f"done; {len(pending)} runs were dropped", flush=True)
    for pool in pools.values():
        for process in list(pool._processes.values()):
            process.kill()
    os._exit(0)


def submit_again(
    finished: list[dict[str, Any]], count: dict[str, int], submit: Any, device: str
) -> None:
    """Another seed of that one of the best four candidates that has fewest."""
    kinds = ("em ",) if device == "cpu" else ("rv", "sh")
    known = [r for r in finished if r["task"].startswith(kinds) and "chosen" in r]
    best = sorted(known, key=promise)[:4]
    if best:
        submit(min((r["task"] for r in best), key=lambda task: count[task]), device)


if __name__ == "__main__":
    main()
