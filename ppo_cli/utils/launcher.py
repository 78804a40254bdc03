"""What a launcher such as torchrun says in the environment about the processes that it started.

Nothing here imports torch: a process has to know whether it may print before it loads anything.
"""

from __future__ import annotations

import os
import sys

from ppo_cli.errors import UsageError

OURS = "PPO_CLI_LAUNCHER"  # the number of the process of this program that started this one
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # where WORLD_SIZE is above 1
STARTED_BY = {  # variables that hold a number of processes which are told nothing else
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
HOW = (
    "start them with 'torchrun --nproc-per-node N -m ppo_cli train ...' or, on one machine, with "
    "--num-processes N"
)


def count() -> int:
    """Number of processes that were started together; 1 without a launcher."""
    return max(_number("WORLD_SIZE", 1), 1)


def index() -> int:
    """Number of this process, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def local_index() -> int:
    """Number of this process among those of its machine, which decides its GPU."""
    return _number("LOCAL_RANK", 0) if count() > 1 else 0


def is_ours() -> bool:
    """Whether `--num-processes` or a sweep started this process."""
    return os.environ.get(OURS, "") == str(os.getppid())


def check(wanted: int | None = None) -> None:
    """Check that the processes which were asked for are there, as far as the environment tells.

    Args:
        wanted: how many this process is to start (`--num-processes`); None for none.

    Raises:
        UsageError: several were asked for and each would train by itself, the variables of a
            launcher are wrong or incomplete, or a launcher's processes are to start others.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = os.environ.get(name) or "1"
        if not text.isdecimal() or (name == "WORLD_SIZE" and not int(text)):
            raise UsageError(
                f"{name} in the environment is {text!r}, no number: correct or unset it"
            )
    if count() > 1:
        _check_world(wanted)
    elif not os.environ.get("WORLD_SIZE"):
        _check_lone(wanted)


def usable_cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, psutil.cpu_count(logical=False) or sys.maxsize)


def _check_lone(wanted: int | None) -> None:
    """`check` of one process that no launcher has told of others."""
    for name, program in STARTED_BY.items():
        if (tasks := _number(name, 1)) > 1:
            raise UsageError(
                f"{program} started {tasks} processes ({name}), but WORLD_SIZE is not set: each "
                f"would train by itself. Let {program} start one a machine, and {HOW}"
            )
    if wanted is not None:
        return
    if (tasks := _number("SLURM_NTASKS", 1)) > 1:
        raise UsageError(
            f"this Slurm job has {tasks} tasks (SLURM_NTASKS), but this is one process: {HOW}, or "
            "unset SLURM_NTASKS for one"
        )
    # accelerate sets both for several processes, and WORLD_SIZE where it does start them.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise UsageError(
            "accelerate launch was asked for several processes and started one, as it does with "
            f"--cpu: {HOW}"
        )


def _check_world(wanted: int | None) -> None:
    """`check` of several processes."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise UsageError(
            f"WORLD_SIZE is {count()}, without {', '.join(missing)}: {HOW}, or unset WORLD_SIZE "
            "for one process"
        )
    if index() >= count():
        raise UsageError(f"RANK is {index()}, but WORLD_SIZE {count()}: ranks are counted from 0")
    if wanted is not None and not is_ours():
        raise UsageError(
            f"a launcher started {count()} processes (WORLD_SIZE), and --num-processes would start "
            "more in each: leave it out"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
