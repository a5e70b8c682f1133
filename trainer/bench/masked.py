"""The section `masked`: a step of MixedAE, part by part, against one of MAE with the same encoder and decoder.

ViT-Small on 224 px in patches of 16, 8 images, the authors' decoder, float32; time is the processor's, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from trainer.bench.figures import Figure, Goal, Say, Settings, in_turns
from trainer.bench.loader import one_thread
from trainer.data.batch import Views
from trainer.methods.base import Method, Progress
from trainer.methods.mae import MAE, MAEConfig
from trainer.methods.mixed_ae import MixedAE, MixedAEConfig
from trainer.nn.encoders import EncoderConfig, make_encoder

SIZE, IMAGES = 224, 8
_ENCODER = EncoderConfig(name="vit_small_patch16_224")
_NONE: dict[str, Any] = {"homologous_attention": False, "contrastive_weight": 0.0, "segment_embedding": "none"}
PARTS: Mapping[str, dict[str, Any]] = {
    "mixing": _NONE,
    "mixing + segments": {**_NONE, "segment_embedding": "input"},
    "mixing + contrast": {**_NONE, "contrastive_weight": 0.1},
    "mixing + attention": {**_NONE, "homologous_attention": True},
    "all parts": {},
}


def measure(settings: Settings, say: Say, encoder: EncoderConfig = _ENCODER, **decoder: Any) -> list[Figure]:
    """One figure for each part; the paper's extra cost of pre-training is 3 %. `decoder` are settings of both."""

    def made(method: Callable[..., Method], config: Any) -> Callable[[], int]:
        torch.manual_seed(0)
        return step(method(lambda **changed: make_encoder(encoder, SIZE, **changed), config))

    with one_thread():
        tasks = {name: made(MixedAE, MixedAEConfig(**decoder, **parts)) for name, parts in PARTS.items()}
        tasks["MAE"] = made(MAE, MAEConfig(**decoder))
        for task in tasks.values():
            task()  # warms up
        times = in_turns(settings.round_count(5), tasks, say, time.process_time)
    return [_figure(name, encoder, times) for name in PARTS]


def _figure(name: str, encoder: EncoderConfig, times: Mapping[str, Any]) -> Figure:
    ratio, spread = times[name].speedup(times["MAE"])
    return Figure(
        name=f"MixedAE {encoder.name}, {IMAGES} images, {name}, a step",
        ours=1e3 / times[name].rate,
        unit="ms",
        baseline=1e3 / times["MAE"].rate,
        baseline_name="MAE",
        ratio=ratio,
        spread=spread,
        goal=Goal(bound=1 / 1.03) if name == "all parts" else None,
    )


def step(method: nn.Module) -> Callable[[], int]:
    """One step of AdamW on noise; returns 1, the number of steps done."""
    optimiser = torch.optim.AdamW(method.parameters(), lr=1e-4)
    crops = torch.randn(1, IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    progress = Progress(step=1, total_steps=2, steps_per_epoch=1)

    def run() -> int:
        method(Views(crops=crops), progress).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return 1

    return run
