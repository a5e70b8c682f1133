"""What a comparison was begun with, by content: encoder, tasks and source. It never goes on with other ones."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from manifests.errors import UsageError
from trainer.engine.run_folder import RunFolder
from trainer.evaluate.retention import Part
from trainer.finetune.settle import Settled

INPUTS = "inputs.json"


def inputs_of(settled: Settled) -> dict[str, str]:
    """A fingerprint of each."""
    found = {"encoder": _of_weights(settled.encoder)}
    found |= {f"task {task.name}": task.fingerprint for task in settled.tasks}
    if settled.source is not None:
        found["source"] = _of_part(settled.source.bank) + _of_part(settled.source.queries)
    return found


def check_inputs(folder: RunFolder, now: dict[str, str]) -> None:
    """Raises `UsageError` naming what is not as it was when the comparison in `folder` was begun."""
    before = folder.read_json(INPUTS) or {}
    changed = [name for name, fingerprint in now.items() if before.get(name, fingerprint) != fingerprint]
    if changed:
        raise UsageError(
            f"{folder.path} was begun with another {', '.join(changed)} than there is now at the same place (images "
            "were added, removed or relabelled, or weights replaced). Put it back to go on, or give another --out"
        )


def _of_weights(encoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_part(part: Part) -> str:
    return hashlib.sha256(part.images.fingerprint.encode() + part.indices.tobytes()).hexdigest()
