"""What a GPU does in a PPO batch, and how often the CPU waits for it.

python tests/benchmarks/gpu_profile.py [MODEL] [BATCH] [PRECISION]

Of sampling, of `step()` and of the optimisation loop in it: milliseconds without the profiler; and
with it, how many kernels and graphs the CPU launched, for how long kernels ran, and how often it
waited; then the operations that took longest. MODEL and PRECISION are worker.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from worker import Workload, now

from ppo_cli.ppo.update import Update

LAUNCHES = ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernel", "cudaMemcpyAsync")
PARTS = ("sampling", "step", "optimisation")


def labelled(work: Callable[..., Any], name: str, milliseconds: dict[str, float] | None) -> Any:
    """`work`, which the profiler knows by `name`.

    Notes how long it took, for which it waits for the GPU, unless `milliseconds` is None.
    """

    def call(*arguments: Any) -> Any:
        if milliseconds is None:
            with record_function(name):
                return work(*arguments)
        started = now()
        result = work(*arguments)
        milliseconds[name] = 1000 * (now() - started)
        return result

    return call


def main() -> None:
    """Some batches to warm up, one for the times, one for the profile."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU that torch can use")
    model, batch, precision = (sys.argv[1:] + ["gpt2", "32", "bf16"][len(sys.argv) - 1 :])[:3]
    work = Workload("ours", model, int(batch), precision)
    run: Any = Update.run

    def once(milliseconds: dict[str, float] | None = None) -> None:
        Update.run = labelled(run, "optimisation", milliseconds)  # type: ignore[method-assign]
        queries, limits = work.draw()
        responses = labelled(work.sample, "sampling", milliseconds)(queries, limits)
        labelled(work.step, "step", milliseconds)(queries, responses)

    for _ in range(3):
        once()
    times: dict[str, float] = {}
    once(times)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        once()
    events = seen.events() or []
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in PARTS]
    print(f"{model}, batch {batch}, {precision}, {torch.cuda.get_device_name()}")
    print("| part | ms | launches | kernels ran ms | waits |\n|---|---:|---:|---:|---:|")
    for part in PARTS:
        (span,) = [e.time_range for e in on_cpu if e.name == part]
        calls, ran = (
            [e for e in some if span.start <= e.time_range.start <= span.end]
            for some in (on_cpu, kernels)
        )
        launches = sum(e.name.startswith(LAUNCHES) for e in calls)
        waits = sum(e.name.endswith("Synchronize") for e in calls)
        milliseconds = sum(e.time_range.elapsed_us() for e in ran) / 1000
        print(f"| {part} | {times[part]:.1f} | {launches} | {milliseconds:.1f} | {waits} |")
    for order in ("self_cuda_time_total", "self_cpu_time_total"):
        print(seen.key_averages().table(sort_by=order, row_limit=14, max_name_column_width=60))


if __name__ == "__main__":
    main()
