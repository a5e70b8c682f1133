"""`trainer pretrain`: what was typed to a trained encoder in a run folder."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from accelerate import PartialState

from trainer.config import PretrainConfig
from trainer.data.order import batches, micro_batch_size
from trainer.engine.launch import adopt_srun, common_folder, make_accelerator
from trainer.engine.progress import ProgressLine
from trainer.engine.run_folder import RunFolder
from trainer.engine.signals import stop_requested
from trainer.methods.base import Method
from trainer.nn import precision
from trainer.nn.collectives import together
from trainer.parts import make_method, total_steps
from trainer.resume import Start, check_agreed, start_of
from trainer.run import Outcome, Run
from trainer.settle import Request, Settled, settle


def pretrain(request: Request) -> Outcome:
    """`train` as all that this process does."""
    outcome = train(request)
    PartialState().destroy_process_group()
    return outcome


def train(request: Request) -> Outcome:
    """Run, or go on with, what was asked. Raises `DiffmixError`s; `CollapsedError` after writing results.json."""
    adopt_srun(os.environ)
    processes = PartialState(cpu=not torch.cuda.is_available())
    settled, method = together(lambda: _settled(request, processes.num_processes))
    chosen = together(lambda: precision_of(settled.config, method))
    folder, main = common_folder(request.out, settled.config.method.name), processes.is_main_process
    accelerator = make_accelerator(chosen, settled.config.run.trackers, folder.path)
    line = ProgressLine(speaks=main)
    with contextlib.ExitStack() as stack:
        start = together(lambda: _start(folder, settled, request.resume, stack if main else None))
        check_agreed(start, folder)
        for note in (*settled.notes, chosen.reason, start.note):
            line.say(note) if note else None
        if start.finished is not None:
            return Outcome(state="already finished", folder=folder.path, results=start.finished, is_main=main)
        stop = stack.enter_context(stop_requested())
        run = together(lambda: Run(settled, method, accelerator, chosen, folder, line, start))
        return run.carry_out(stop)


def _settled(request: Request, num_processes: int) -> tuple[Settled, Method]:
    """What is asked, and the method, which refuses settings that cannot be before anything is written."""
    settled = settle(request)
    method, run = make_method(settled.config), settled.config.run
    method.check_batch(micro_batch_size(run.batch_size, num_processes, run.accumulation))
    return settled, method


def _start(folder: RunFolder, settled: Settled, resume: str, stack: contextlib.ExitStack | None) -> Start:
    """Where the run goes on, as this process sees the folder; with a `stack` that locks it."""
    if stack is not None:
        stack.enter_context(folder.locked())
    config = settled.config
    return start_of(folder, config, resume, fingerprint=settled.policy.fingerprint, anyway=config.data.allow_changed)


def describe(request: Request) -> dict[str, Any]:
    """What a run would be: settings and counts, for `--dry-run`. Makes and trains nothing."""
    settled, _ = _settled(request, 1)
    config, items = settled.config, settled.policy.num_items
    per_epoch = batches(items, config.run.batch_size)
    steps = total_steps(config.run, per_epoch)
    counts = f"{items} samples, {per_epoch} steps an epoch, {steps} steps of {config.run.batch_size} images"
    return {
        "config": config.to_dict(),
        "samples": items,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "text": "\n".join([*settled.notes, config.to_yaml() + counts]),
    }


def precision_of(config: PretrainConfig, method: Method) -> precision.Precision:
    """How the networks of a run compute on this machine."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    kind: precision.EncoderKind = "vit" if hasattr(method.encoder, "patch_embed") else "convnet"
    return precision.choose(device, kind, config.run.precision)
