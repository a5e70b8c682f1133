"""Real `trainer` processes to kill."""

import os
import signal
import socket
import sys

from tests.faults.conftest import Command


def _child(given, environment, log, prepare):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    from trainer import cli

    if prepare is not None:
        prepare()
    sys.argv = ["trainer", *given]
    cli.main()


class Training(Command):
    """One running `trainer` command; `prepare` is called in its process before it."""

    def __init__(self, context, given, environment, log, prepare=None):
        self.log = log
        self.process = context.Process(target=_child, args=(given, environment, str(log), prepare))
        self.process.start()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def srun(rank, port):
    """What `srun --ntasks 2` sets for a task, on a port of its own."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_PORT": port,
    }
