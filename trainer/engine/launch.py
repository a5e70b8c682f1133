"""How this process belongs to a run of several: torchrun says so in the environment, srun is taught to."""

from __future__ import annotations

import re
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list

from trainer.engine.run_folder import RunFolder
from trainer.nn.collectives import together
from trainer.nn.precision import Precision

T = TypeVar("T")

_FIRST_PORT, _PORTS = 20_000, 20_000


def adopt_srun(environment: MutableMapping[str, str]) -> bool:
    """Under `srun` without torchrun, set what torch.distributed reads; True if it did.

    SLURM_NTASKS is never used: it is also set in a plain batch script, which is one process.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or not tasks.isdigit() or int(tasks) < 2 or "SLURM_PROCID" not in environment:
        return False
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=_first_number(environment.get("SLURM_STEP_TASKS_PER_NODE", tasks)),
    )
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (job * 31 + step) % _PORTS))
    return True


def make_accelerator(precision: Precision, trackers: Sequence[str], folder: Path) -> Accelerator:
    """Accelerate for one run, whose TensorBoard events, and those of other `trackers`, lie in `folder`."""
    return Accelerator(
        mixed_precision={torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[precision.dtype],
        cpu=not torch.cuda.is_available(),
        log_with=["tensorboard", *trackers],
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def shared(value: T) -> T:
    """The main process's value, on all."""
    found = [value]
    broadcast_object_list(found)
    return found[0]


def common_folder(out: str | None, kind: str) -> RunFolder:
    """`out`, else a new folder in runs/ by the main process's clock and the kind of run; the same on all."""
    path = shared(out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{kind}")
    return together(lambda: RunFolder(path))


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[03-05,9],login` is gpu03."""
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", nodes).partition(",")[0] or "127.0.0.1"


def _first_number(text: str) -> str:
    match = re.match(r"[0-9]+", text)
    return match[0] if match else "1"
