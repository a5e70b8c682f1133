"""Images per second and core: reading, decoding and augmenting, against webdataset, PIL and torchvision's transforms.

Both sides read the same tar from the file cache with one thread, and make the same views under the same probabilities.
The clock counts processor time: what a core does, however many programs share it. Two figures for ours: as it feeds a
GPU (uint8 views and the colours' parameters; the GPU does the rest), and all on the CPU.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from manifests import layout
from manifests.shard import EncodedImage
from trainer.bench import peer, photos
from trainer.bench.figures import Figure, Goal, Say, Settings, Times, in_turns
from trainer.data import mixing
from trainer.data.augmentations import Augmentation
from trainer.data.colours import Colours
from trainer.data.loader import Loader, _Pending
from trainer.data.mixing import MixConfig
from trainer.data.rows import REAL, Rows
from trainer.data.view_plan import ViewConfig, ViewPlan

Task = Callable[[], int]  # does some items and says how many

_WEBDATASET, _IN_MEMORY = "webdataset + PIL + torchvision v1", "PIL images in memory + torchvision v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is read and made of it. A round of the baseline is one pass over the rows, one of ours `passes`."""

    name: str
    unit: str
    policy: Literal["diffmix", "real"]
    views: ViewConfig
    num_local_crops: int = 0
    thumbnails: bool = False  # small images, which the loader keeps decoded
    rows: int = 128
    batch_size: int = 32
    passes: int = 3
    goals: Mapping[str, Goal] = field(default_factory=dict)

    @property
    def variations(self) -> int:
        """Synthetic images of a row."""
        return int(self.policy == "diffmix")


WORKLOADS = (
    Workload(
        name="pairs, SimCLR 224",
        unit="pairs/s",
        policy="diffmix",
        views=ViewConfig(augment="simclr"),
        goals={"uint8": Goal(bound=4.5), "cpu": Goal(bound=2.5)},
    ),
    Workload(
        name="pairs, DINO 2x224 + 8x96",
        unit="pairs/s",
        policy="diffmix",
        views=ViewConfig(augment="dino"),
        num_local_crops=8,
        goals={"uint8": Goal(bound=6), "cpu": Goal(bound=3)},
    ),
    Workload(
        name="two views of one image, SimCLR 224",
        unit="images/s",
        policy="real",
        views=ViewConfig(augment="simclr"),
        goals={"uint8": Goal(bound=6)},
    ),
    Workload(
        name="CIFAR 32 px, two views of one image",
        unit="images/s",
        policy="real",
        views=ViewConfig(augment="simclr-cifar", size=32),
        thumbnails=True,
        rows=1024,
        batch_size=256,
        passes=15,
        goals={"uint8": Goal(bound=20), "cpu": Goal(bound=10)},
    ),
)


def measure(settings: Settings, say: Say) -> list[Figure]:
    """Four figures a workload at most; without webdataset none."""
    if importlib.util.find_spec("webdataset") is None:
        say("skipped: loader, since webdataset is not installed (pip install 'diffmix[bench]')")
        return []
    count = 256
    given = None if settings.images is None else photos.read_tar(settings.images, count)
    figures = []
    for work in WORKLOADS:
        chosen = replace(work, rows=work.rows // 4, batch_size=work.batch_size // 4) if settings.quick else work
        images = photos.thumbnails(chosen.rows) if work.thumbnails else given or photos.photographs(count)
        size = sum(len(image.data) for image in images) / len(images)
        say(f"loader: {work.name}; JPEGs of {size / 1000:.1f} kB on average")
        figures += compare(chosen, images, settings.round_count(7), say)
    return figures


def compare(work: Workload, images: Sequence[EncodedImage], rounds: int, say: Say) -> list[Figure]:
    """Both of our paths against the baselines, over a pair set that is written for it."""
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diffmix-bench-")))
        url = photos.write_pairs(folder / "pairs", images, work.rows, work.variations)
        tasks = _baselines(work, url, images)
        for name, loader in (("uint8", host_loader(work, url)), ("cpu", cpu_loader(work, url))):
            tasks[name] = _task(stack.enter_context(loader), work, work.passes)
        for task in tasks.values():
            task()
        times = in_turns(rounds, tasks, say, time.process_time)
    figures = [_figure(work, path, _WEBDATASET, times) for path in ("uint8", "cpu")]
    if _IN_MEMORY in times:
        figures += [_figure(work, path, _IN_MEMORY, times) for path in ("uint8", "cpu")]
    return figures


def _figure(work: Workload, path: str, baseline: str, times: Mapping[str, Times]) -> Figure:
    ratio, spread = times[path].speedup(times[baseline])
    return Figure(
        name=f"{work.name}, {'uint8 for a GPU' if path == 'uint8' else 'all on the CPU'}",
        ours=times[path].rate,
        unit=f"{work.unit} per core",
        baseline=times[baseline].rate,
        baseline_name=baseline,
        ratio=ratio,
        spread=spread,
        goal=work.goals.get(path) if baseline == _WEBDATASET else None,
        note="ours keeps the decoded images in memory" if work.thumbnails and baseline == _WEBDATASET else None,
    )


def cpu_loader(work: Workload, url: str) -> Loader:
    """The loader as it trains on the CPU."""
    return _loader(Loader, work, url, "cpu")


def host_loader(work: Workload, url: str) -> Loader:
    """The loader as it feeds a GPU, ending where the GPU would begin."""
    return _loader(_HostLoader, work, url, "meta")


def _loader(kind: type[Loader], work: Workload, url: str, device: str) -> Loader:
    return kind(
        mixing.make(MixConfig(policy=work.policy), Rows.open(url)),
        work.views,
        num_crops=2,
        num_local_crops=work.num_local_crops,
        batch_size=work.batch_size,
        seed=0,
        device=device,
        workers=1,
        prefetch=0,  # or threads would work ahead while others are timed
        cache_bytes=1 << 30 if work.thumbnails else 0,
    )


class _HostLoader(Loader):
    """The views are the uint8 tensors [V, B, S, S, 3] that would be uploaded."""

    def _finished(self, pending: _Pending) -> list[Tensor]:
        parts = [pending.colours[start] for start in sorted(pending.colours)]
        first = 0
        for tensor in pending.tensors:
            views = range(first, first + len(tensor))
            Colours.concatenate([part[view] for view in views for part in parts])
            first += len(tensor)
        return pending.tensors


def _task(batches: Iterator[object], work: Workload, passes: int) -> Task:
    count = work.rows // work.batch_size * passes

    def task() -> int:
        for _ in islice(batches, count):
            pass
        return count * work.batch_size

    return task


def _baselines(work: Workload, url: str, images: Sequence[EncodedImage]) -> dict[str, Task]:
    peer.seed(0)
    found = {_WEBDATASET: _task(peer.endless(webdataset_batches(work, url)), work, 1)}
    if work.thumbnails:
        pictures = [Image.open(io.BytesIO(image.data)).convert("RGB") for image in images]
        batches = peer.from_memory(pictures, peer_views(work, url), work.batch_size)
        found[_IN_MEMORY] = _task(peer.endless(batches), work, 1)
    return found


def webdataset_batches(work: Workload, url: str) -> Iterable[list[Tensor]]:
    """One pass of the baseline over the shard of the set."""
    members = ["real.jpg", *(f"syn{number}.jpg" for number in range(work.variations))]
    return peer.from_tar(f"{url}/{layout.tar_name(0)}", members, peer_views(work, url), work.batch_size)


def peer_views(work: Workload, url: str) -> peer.Views:
    """The baseline's views of a sample's images, in our order and of the same of them."""
    plan = ViewPlan.of(work.views, 2, work.num_local_crops)
    policy = mixing.make(MixConfig(policy=work.policy), Rows.open(url))
    sources = policy.assign(np.zeros(1, np.int64), 0, 0, 2, work.num_local_crops).images[:, 0] - REAL
    views: list[tuple[Augmentation, int]] = [
        *((view, plan.size) for view in plan.crops),
        *((view, plan.local_size) for view in plan.local_crops),
    ]
    transforms = [peer.transform(view, size, work.views) for view, size in views]

    def make(images: Sequence[Image.Image]) -> list[Tensor]:
        return [apply(images[source]) for apply, source in zip(transforms, sources.tolist(), strict=True)]

    return make


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one core, so that both sides have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
