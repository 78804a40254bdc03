"""What the environment says about the processes of a run, and which worlds are refused."""

from __future__ import annotations

import os

import pytest

from ppo_cli.errors import UsageError
from ppo_cli.utils import launcher

WORLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "wanted", "message"),
    [
        ({"WORLD_SIZE": "two"}, None, "WORLD_SIZE in the environment is 'two'"),
        ({"WORLD_SIZE": "0"}, None, "WORLD_SIZE in the environment is '0'"),
        ({**WORLD, "RANK": "-1"}, None, "RANK in the environment is '-1'"),
        ({**WORLD, "RANK": "2"}, None, "RANK is 2, but WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2"}, None, "without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start"),
        ({**WORLD, "LOCAL_RANK": ""}, None, "without LOCAL_RANK: start them with 'torchrun"),
        (WORLD, 2, "WORLD_SIZE), and --num-processes would start more in each: leave it out"),
        ({**WORLD, launcher.OURS: "1"}, 2, "leave it out"),
        (ACCELERATE, None, "accelerate launch was asked for several processes and started one"),
        ({"SLURM_NTASKS": "4"}, None, "has 4 tasks (SLURM_NTASKS), but this is one process"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 2, "srun started 4 processes (SLURM_STEP_NUM_TASKS)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "mpirun started 2 processes"),
        ({"PMI_SIZE": "2"}, None, "mpirun started 2 processes"),
        ({}, None, None),
        ({"WORLD_SIZE": "", "RANK": ""}, 2, None),
        ({"WORLD_SIZE": "1", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4"}, None, None),
        ({"SLURM_NTASKS": "1", "MASTER_ADDR": "a"}, None, None),
        ({"SLURM_NTASKS": "4", **ACCELERATE}, 4, None),
        ({**WORLD, "SLURM_STEP_NUM_TASKS": "2"}, None, None),
        ({**WORLD, launcher.OURS: str(os.getppid())}, 2, None),
    ],
)
def test_a_world_that_was_asked_for_and_is_not_there_is_refused(
    variables: dict[str, str],
    wanted: int | None,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*WORLD, *ACCELERATE, *launcher.STARTED_BY, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message is None:
        launcher.check(wanted)
    else:
        with pytest.raises(UsageError) as refused:
            launcher.check(wanted)
        assert message in str(refused.value)
