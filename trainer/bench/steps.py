"""Milliseconds of a training step: ours, the same written out by hand, and lightly's, in turns in one process.

All three start from the same weights, see the same views and use the same optimiser; float32, on the CPU's threads as
they are set. Only lightly runs the views one by one, as its examples do.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.data.batch import Views
from trainer.methods.base import Progress
from trainer.methods.dino import DINO, DINOConfig
from trainer.methods.dino_loss import dino_loss, teacher_probabilities
from trainer.methods.simclr import SimCLR, SimCLRConfig
from trainer.nn import precision
from trainer.nn.encoders import EncoderConfig, make_encoder

Step = Callable[[], Tensor]  # one whole optimiser step; returns its loss, detached
Say = Callable[[str], None]  # progress, for people

# Past the freeze of the prototypes, so that all of the network trains.
_PROGRESS = Progress(step=500, total_steps=1000, steps_per_epoch=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTask:
    """What is trained: `images` of `size` px in two views, and `local_crops` of `local_size` px."""

    name: str
    method: Literal["dino", "simclr"]
    encoder: str
    images: int
    size: int
    local_crops: int = 0
    local_size: int = 0
    out_dim: int = 128

    def views(self) -> Views:
        """Noise, the same every time."""
        draw = torch.Generator().manual_seed(0)
        crops = torch.randn(2, self.images, 3, self.size, self.size, generator=draw)
        if not self.local_crops:
            return Views(crops=crops)
        local = (self.local_crops, self.images, 3, self.local_size, self.local_size)
        return Views(crops=crops, local_crops=torch.randn(local, generator=draw))


_DINO = StepTask(
    name="DINO ViT-Ti 2x96+4x48, 32 images",
    method="dino",
    encoder="vit_tiny_patch16_224",
    images=32,
    size=96,
    local_crops=4,
    local_size=48,
    out_dim=2048,
)
TASKS = (
    _DINO,
    replace(_DINO, name="DINO ViT-Ti 2x96+4x48, 8 images", images=8),
    StepTask(name="SimCLR ResNet-18 2x32, 64 images", method="simclr", encoder="resnet18_cifar", images=64, size=32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Milliseconds of a step, medians over the rounds; `speedup` of ours is the median of the rounds' ratios.

    `losses` are those of the first step: equal where the computation is (lightly's SimCLR has BatchNorm see one view
    at a time). `skipped` says why there is no figure for a baseline.
    """

    task: StepTask
    rounds: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    speedup_range: dict[str, tuple[float, float]]
    losses: dict[str, float]
    skipped: dict[str, str]


def measure(task: StepTask, rounds: int = 5, say: Say = lambda text: None) -> StepTimes:
    """Times `ours`, `minimal` and, where it can be imported, `lightly`."""
    steps, skipped = make_steps(task)
    losses = {name: step().item() for name, step in steps.items()}  # also warms up
    seconds = _in_turns(rounds, steps, say)
    ratios = {
        name: [theirs / ours for theirs, ours in zip(times, seconds["ours"], strict=True)]
        for name, times in seconds.items()
        if name != "ours"
    }
    return StepTimes(
        task=task,
        rounds=rounds,
        milliseconds={name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        speedup={name: statistics.median(values) for name, values in ratios.items()},
        speedup_range={name: (min(values), max(values)) for name, values in ratios.items()},
        losses=losses,
        skipped=skipped,
    )


def make_steps(task: StepTask) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps by name, and for those that cannot run the reason."""
    method = _make_method(task)
    views = task.views()
    steps = {"minimal": minimal_step(copy.deepcopy(method), views)}
    skipped = {}
    try:
        from trainer.bench.lightly_steps import lightly_step

        steps["lightly"] = lightly_step(copy.deepcopy(method), views)
    except ImportError as error:
        skipped["lightly"] = f"lightly cannot be imported ({error}); `pip install lightly` adds it to the comparison"
    return {"ours": our_step(method, views), **steps}, skipped


def _make_method(task: StepTask) -> DINO | SimCLR:
    torch.manual_seed(0)
    encoder = EncoderConfig(name=task.encoder)
    if task.method == "simclr":
        return SimCLR(lambda: make_encoder(encoder, task.size), SimCLRConfig(hidden_dim=512, out_dim=task.out_dim))
    config = DINOConfig(out_dim=task.out_dim, local_crops=task.local_crops, drop_path=0.0)
    return DINO(lambda **arguments: make_encoder(encoder, task.size, **arguments), config)


def make_optimiser(*networks: nn.Module) -> Optimizer:
    """The same for everyone."""
    parameters = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4)


def our_step(method: DINO | SimCLR, views: Views) -> Step:
    """As the engine does it, in the memory layout that it chooses."""
    kind: precision.EncoderKind = "vit" if hasattr(method.encoder, "patch_embed") else "convnet"
    precision.prepare(method, precision.choose(torch.device("cpu"), kind))
    optimiser = make_optimiser(method)

    def step() -> Tensor:
        loss = method(views, _PROGRESS).loss
        loss.backward()
        method.before_update(_PROGRESS)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        method.after_step(_PROGRESS)
        return loss.detach()

    return step


def minimal_step(method: DINO | SimCLR, views: Views) -> Step:
    """The same networks and loss in the fewest lines, without logs, ranks, schedules or precautions."""
    return _minimal_simclr(method, views) if isinstance(method, SimCLR) else _minimal_dino(method, views)


def _minimal_simclr(method: SimCLR, views: Views) -> Step:
    network = nn.Sequential(method.backbone, method.head)
    optimiser = make_optimiser(network)
    temperature = method.config.temperature
    images = views.crops.shape[1]
    partner = (torch.arange(2 * images) + images) % (2 * images)

    def step() -> Tensor:
        projections = F.normalize(network(views.crops.flatten(0, 1)), dim=-1)
        logits = (projections @ projections.T / temperature).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, partner)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _minimal_dino(method: DINO, views: Views) -> Step:
    student, student_head = method.student, method.student_head
    teacher, teacher_head = method.teacher, method.teacher_head
    optimiser = make_optimiser(student, student_head)
    followers: list[Tensor] = [*teacher.parameters(), *teacher_head.parameters()]
    leaders: list[Tensor] = [*student.parameters(), *student_head.parameters()]
    center = method.center.clone()
    crops = [values.flatten(0, 1) for values in (views.crops, views.local_crops) if values is not None]

    def step() -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(teacher(crops[0])).unflatten(0, views.crops.shape[:2])
            targets, _ = teacher_probabilities(wanted, center, 0.04)
        logits = student_head(torch.cat([student(crop) for crop in crops])).unflatten(0, (-1, views.crops.shape[1]))
        loss = dino_loss(logits, targets, 0.1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            center.lerp_(wanted.mean((0, 1)), 0.1)
            torch._foreach_lerp_(followers, leaders, 0.002)
        return loss.detach()

    return step


def _in_turns(rounds: int, steps: Mapping[str, Step], say: Say) -> dict[str, list[float]]:
    """Seconds of every step in every round, in turn and in turning order, so that what disturbs one disturbs all."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
        say(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names))
    return seconds
