"""All sections in order, and the words for them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trainer.bench import SECTIONS
from trainer.bench.figures import Figure, Say, Settings

_LIBRARIES = ("torch", "torchvision", "timm", "numba", "simplejpeg", "pillow", "numpy", "webdataset", "lightly")


def bench(settings: Settings, sections: Sequence[str], say: Say) -> dict[str, Any]:
    """Figures by section, and the machine they are of."""
    machine = machine_facts()
    found: dict[str, list[Figure]] = {}
    for name in sections:
        module, _, function = SECTIONS[name].partition(":")
        found[name] = getattr(import_module(module), function)(settings, say)
        for figure in found[name]:
            say(figure.text())
    facts = {name: [figure.facts() for figure in figures] for name, figures in found.items()}
    return {"machine": machine, "sections": facts, "text": bench_text(machine, found)}


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on; `load` says whether the machine was idle."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: found for name in _LIBRARIES if (found := _version(name)) is not None},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def bench_text(machine: dict[str, Any], found: dict[str, list[Figure]]) -> str:
    """For people: a line about the machine, one per figure."""
    load = "" if machine["load"] is None else f", load {machine['load']} at the start"
    lines = [f"{machine['device']}, {machine['cores']} cores, {machine['torch_threads']} torch threads{load}"]
    for name, figures in found.items():
        lines += ["", name, *(f"  {figure.text()}" for figure in figures or ())]
        lines += [] if figures else ["  nothing measured"]
    return "\n".join(lines)
