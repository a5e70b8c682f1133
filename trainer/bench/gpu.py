"""Whole training steps on a GPU: images/s and the share of its peak, on made-up views and fed by the loader.

Runs on any device; without a known peak, figures are images/s and FLOP/s.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.bench import photos
from trainer.bench.figures import Figure, Say, Settings
from trainer.data.batch import Views
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig, make
from trainer.data.rows import Rows
from trainer.data.view_plan import ViewConfig
from trainer.methods.base import Method, Progress
from trainer.methods.dino import DINO, DINOConfig
from trainer.methods.simclr import SimCLR, SimCLRConfig
from trainer.nn.encoders import EncoderConfig, make_encoder
from trainer.nn.precision import choose, prepare

# Dense bf16 FLOP/s by NVIDIA's data sheets; the first name that a device's name contains.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}
_PROGRESS = Progress(step=500, total_steps=1000, steps_per_epoch=100)  # past DINO's freeze: all of it trains
_BUSY = 0.95  # of the rate on made-up views, from which on the loader holds nothing up


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained, `batch_size` images a step."""

    name: str
    method: Literal["dino", "simclr"]
    encoder: str
    batch_size: int
    views: ViewConfig
    local_crops: int = 0
    out_dim: int = 128
    steps: int = 50
    warm_up: int = 5  # steps
    rows: int = 512  # of the pair set that is read

    def make(self) -> Method:
        """The method with random weights."""
        encoder = EncoderConfig(name=self.encoder)
        if self.method == "simclr":
            return SimCLR(lambda: make_encoder(encoder, self.views.size), SimCLRConfig(out_dim=self.out_dim))
        config = DINOConfig(out_dim=self.out_dim, local_crops=self.local_crops)
        return DINO(lambda **arguments: make_encoder(encoder, self.views.size, **arguments), config)

    def made_up(self, device: torch.device) -> Views:
        """Noise."""
        size, local = self.views.size, self.views.local_size
        crops = torch.randn(2, self.batch_size, 3, size, size, device=device)
        if not self.local_crops:
            return Views(crops=crops)
        shape = (self.local_crops, self.batch_size, 3, local, local)
        return Views(crops=crops, local_crops=torch.randn(shape, device=device))


CASES = (
    Case(
        name="DINO ViT-S/16 2x224 + 8x96",
        method="dino",
        encoder="vit_small_patch16_224",
        batch_size=128,
        views=ViewConfig(augment="dino"),
        local_crops=8,
        out_dim=65536,
    ),
    Case(
        name="SimCLR ResNet-50 2x224",
        method="simclr",
        encoder="resnet50",
        batch_size=256,
        views=ViewConfig(augment="simclr"),
    ),
)


def measure(settings: Settings, say: Say) -> list[Figure]:
    """Two figures a case; none without a GPU."""
    if not torch.cuda.is_available():
        say("skipped: gpu, since there is none here")
        return []
    figures = []
    for case in CASES:
        say(f"gpu: {case.name}, {case.batch_size} images a step")
        chosen = replace(case, steps=10) if settings.quick else case
        figures += measure_case(chosen, torch.device("cuda"), settings.images, say)
    return figures


def measure_case(case: Case, device: torch.device, images: Path | None, say: Say) -> list[Figure]:
    """The rates on made-up views and on those of the loader, which reads a pair set written for it."""
    method = case.make().to(device).train()
    precision = choose(device, "vit" if case.method == "dino" else "convnet")  # bf16 on a GPU
    prepare(method, precision)
    step = training_step(method, device, precision.dtype)
    views = case.made_up(device)
    flops = step_flops(step, views)
    alone, _ = rate(step, repeat(views), case, device)
    say(f"{case.name}: {alone:,.0f} images/s on made-up views")
    with (
        tempfile.TemporaryDirectory(prefix="diffmix-bench-") as folder,
        _loader(case, folder, device, images) as loader,
    ):
        fed, late = rate(step, (batch.views for batch in loader), case, device, loader)
    return [_compute_figure(case, alone, flops, device), _fed_figure(case, alone, fed, late)]


def training_step(method: Method, device: torch.device, dtype: torch.dtype) -> Callable[[Views], Tensor]:
    """As the engine does it: forward under autocast, backward, update, moving averages."""
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")

    def step(views: Views) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = method(views, _PROGRESS).loss
        loss.backward()
        method.before_update(_PROGRESS)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        method.after_step(_PROGRESS)
        return loss.detach()

    return step


def step_flops(step: Callable[[Views], Tensor], views: Views) -> float:
    """Multiplications and additions of one step, by the shapes of its operations; the step is done."""
    with FlopCounterMode(display=False) as counter:
        step(views)
    return float(counter.get_total_flops())


def rate(
    step: Callable[[Views], Tensor],
    views: Iterator[Views],
    case: Case,
    device: torch.device,
    loader: Loader | None = None,
) -> tuple[float, float]:
    """Images/s over `case.steps` steps after some to warm up, and the share of that time that the loader was late."""
    for _ in range(case.warm_up):
        step(next(views))
    _settle(device)
    waited = loader.wait_seconds if loader else 0.0
    started = time.perf_counter()
    for _ in range(case.steps):
        step(next(views))
    _settle(device)
    seconds = time.perf_counter() - started
    late = (loader.wait_seconds - waited) / seconds if loader else 0.0
    return case.steps * case.batch_size / seconds, late


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loader(case: Case, folder: str, device: torch.device, images: Path | None) -> Loader:
    found = photos.photographs(case.rows) if images is None else photos.read_tar(images, case.rows)
    rows = Rows.open(photos.write_pairs(Path(folder) / "pairs", found, case.rows, 1))
    return Loader(
        make(MixConfig(), rows),
        case.views,
        num_crops=2,
        num_local_crops=case.local_crops,
        batch_size=case.batch_size,
        seed=0,
        device=device,
        cache_bytes=0,
    )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its maker's data sheet; None if it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def _compute_figure(case: Case, images_per_second: float, flops: float, device: torch.device) -> Figure:
    rate_of_flops = flops / case.batch_size * images_per_second
    peak = peak_flops(device)
    share = "" if peak is None else f", {100 * rate_of_flops / peak:.0f} % of its peak of {peak / 1e12:,.0f}"
    note = f"{flops / case.batch_size / 1e9:,.0f} GFLOP an image, {rate_of_flops / 1e12:.3g} TFLOP/s{share}"
    return Figure(name=f"{case.name}, made-up views", ours=images_per_second, unit="images/s", note=note)


def _fed_figure(case: Case, alone: float, fed: float, late: float) -> Figure:
    return Figure(
        name=f"{case.name}, fed by the loader",
        ours=fed,
        unit="images/s",
        baseline=alone,
        baseline_name="made-up views",
        ratio=fed / alone,
        note=f"bottleneck: {_bottleneck(fed / alone, late)}; {100 * late:.0f} % of the time the loader was late",
    )


def _bottleneck(share: float, late: float) -> str:
    if share >= _BUSY:
        return "the training step"
    return "the loader's threads" if late > 1 - _BUSY else "the views' way to the device and their colours there"
