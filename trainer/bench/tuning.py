"""The section `tuning`: a step of Block Expansion against the same network built by hand, and what it keeps in memory.

ViT-Tiny on 64 px in patches of 8, 32 images, three new blocks, float32; time is the processor's, on one thread. Memory
is counted, not sampled: tensors that autograd keeps for the backward pass, gradients and AdamW's two moments, without
the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.bench.figures import Figure, Goal, Say, Settings, in_turns
from trainer.bench.loader import one_thread
from trainer.nn.encoders import EncoderConfig, make_encoder
from trainer.tuners.base import Tuner, TunerConfig, make_tuner
from trainer.tuners.spec import parse

SIZE, IMAGES = 64, 32
_ENCODER = EncoderConfig(name="vit_tiny_patch16_224", args={"patch_size": 8})


def measure(settings: Settings, say: Say, encoder: EncoderConfig = _ENCODER, new_blocks: int = 3) -> list[Figure]:
    """Milliseconds against the plain deeper model, megabytes against full fine-tuning."""
    with one_thread():
        tuner = _tuner(encoder, f"block-expansion:{new_blocks}")
        by_hand = deeper_by_hand(encoder, tuner)
        full = _tuner(encoder, "full")
        tasks = {"ours": step(tuner.model), "by hand": step(by_hand)}
        for task in tasks.values():
            task()  # warms up
        times = in_turns(settings.round_count(7), tasks, say, time.process_time)
        kept = {name: kept_bytes(model) for name, model in (("ours", tuner.model), ("full", full.model))}
    ratio, spread = times["ours"].speedup(times["by hand"])
    name = f"block expansion {encoder.name} +{new_blocks}, {IMAGES} images"
    return [
        Figure(
            name=f"{name}, a step",
            ours=1e3 / times["ours"].rate,
            unit="ms",
            baseline=1e3 / times["by hand"].rate,
            baseline_name="deeper timm model",
            ratio=ratio,
            spread=spread,
            goal=Goal(bound=1 / 1.03),
        ),
        Figure(
            name=f"{name}, kept for a step",
            ours=kept["ours"] / 1e6,
            unit="MB",
            baseline=kept["full"] / 1e6,
            baseline_name="full fine-tuning",
            ratio=kept["full"] / kept["ours"],
        ),
    ]


def _tuner(encoder: EncoderConfig, text: str) -> Tuner:
    torch.manual_seed(0)
    return make_tuner(make_encoder(encoder, SIZE), parse(text), TunerConfig())


def deeper_by_hand(encoder: EncoderConfig, tuner: Tuner) -> nn.Module:
    """A timm model as deep as the tuner's with the same weights, of which the new blocks are trained."""
    made = tuner.merged()
    assert made is not None
    plain, changed = made
    model: Any = make_encoder(encoder, SIZE, **changed)
    model.load_state_dict(plain.state_dict())
    model.requires_grad_(False)
    number = -1
    for block in tuner.encoder.get_submodule("blocks").children():
        number += 1
        if hasattr(block, "block_expansion_blocks"):
            number += 1
            model.blocks[number].requires_grad_(True)
    return model


def step(model: nn.Module) -> Callable[[], int]:
    """One step of AdamW on the mean square of the features; returns 1, the number of steps done."""
    optimiser = torch.optim.AdamW(_trainable(model), lr=1e-4)
    images = _images()

    def run() -> int:
        model(images).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return 1

    return run


def kept_bytes(model: nn.Module) -> int:
    """Bytes of what a step keeps besides the weights: tensors for the backward pass, gradients, two moments."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(_images()).square().mean()
    return sum(kept.values()) + 3 * sum(value.nbytes for value in _trainable(model))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters: Iterable[nn.Parameter] = model.parameters()
    return [value for value in parameters if value.requires_grad]


def _images() -> Tensor:
    return torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
