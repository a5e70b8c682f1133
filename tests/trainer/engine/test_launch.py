"""What Slurm's environments say of a process, as `srun` and `sbatch` set them."""

import pytest

from trainer.engine.launch import adopt_srun, first_host

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_a_task_of_several():
    environment = dict(TASK)
    assert adopt_srun(environment)
    added = {name: value for name, value in environment.items() if name not in TASK}
    port = int(added.pop("MASTER_PORT"))
    assert added == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
    }
    assert 20_000 <= port < 40_000


def test_tasks_of_a_step_agree_and_steps_of_a_job_do_not():
    ports = []
    for changes in ({"SLURM_PROCID": "0"}, {"SLURM_PROCID": "7", "SLURM_LOCALID": "3"}, {"SLURM_STEP_ID": "1"}):
        environment = {**TASK, **changes}
        adopt_srun(environment)
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script: one process
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**TASK, "RANK": "2", "WORLD_SIZE": "4"},  # srun starts torchrun, which knows better
        {**TASK, "SLURM_STEP_NUM_TASKS": "odd"},
    ],
    ids=["none", "batch script", "one task", "torchrun", "odd"],
)
def test_others_are_left_alone(environment):
    before = dict(environment)
    assert not adopt_srun(environment)
    assert environment == before


def test_a_chosen_address_stays():
    environment = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_srun(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("tux-a[7,9-11]-ib", "tux-a7-ib"),
        ("rack[0-1]n[02-03]", "rack0n02"),
        ("node-1.cluster.org", "node-1.cluster.org"),
        ("login,gpu[1-2]", "login"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first
