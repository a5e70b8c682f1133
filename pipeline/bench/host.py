"""What one generated image costs the host once the networks are done with it: pixels, encoding, writing.

Both sides start from what their device hands over and write files without waiting for the disk. One thread of torch,
so that it is work that is measured and not how it is spread.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPImageProcessor

from manifests.shard import EncodedVariation, Sample, ShardWriter
from manifests.storage import open_storage
from pipeline.bench.figures import Figure, Goal, Say, Settings, in_turns
from pipeline.bench.pictures import picture
from pipeline.sources.images import encode

_BATCH = 4
_BATCHES = 8
_QUALITY = 90

LESS_WORK, LESS_WITH_SAFETY = Goal(bound=3.5), Goal(bound=6)


def measure(settings: Settings, say: Say) -> list[Figure]:
    """Milliseconds per image, ours and the plain loop's."""
    size = settings.size or 512
    with tempfile.TemporaryDirectory(prefix="diffmix-bench-") as folder, _one_thread():
        work = _HostWork(Path(folder), size, 2 if settings.quick else _BATCHES)
        tasks = {"ours": work.ours, "plain": work.plain, "safety": work.safety, "hand-over": work.hand_over}
        for task in tasks.values():
            task()
        times = in_turns(settings.round_count(7), tasks, say)
    per_image = {name: 1000 * time.median / work.images for name, time in times.items()}
    ratio, spread = times["ours"].speedup(times["plain"])
    with_safety = [
        (plain + safety) / ours
        for ours, plain, safety in zip(*(times[name].seconds for name in ("ours", "plain", "safety")), strict=True)
    ]
    return [
        Figure(
            name=f"host work per {size} px image",
            ours=per_image["ours"],
            unit="ms",
            baseline=per_image["plain"],
            baseline_name="postprocess to PIL, PIL save (quality 75)",
            ratio=ratio,
            spread=spread,
            goal=LESS_WORK,
            note=f"{per_image['hand-over']:.2g} ms of it on the device's thread; ours is quality {_QUALITY}, hashed",
        ),
        Figure(
            name=f"host work per {size} px image, reference safety preprocessing counted",
            ours=per_image["ours"],
            unit="ms",
            baseline=per_image["plain"] + per_image["safety"],
            baseline_name="the same with the safety checker's CLIP input",
            ratio=sorted(with_safety)[len(with_safety) // 2],
            spread=(min(with_safety), max(with_safety)),
            goal=LESS_WITH_SAFETY,
        ),
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _HostWork:
    """The same pictures as either side's device leaves them."""

    def __init__(self, folder: Path, size: int, batches: int) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.stack([torch.from_numpy(picture(generator, size, size)) for _ in range(_BATCH)])
        self.images = _BATCH * batches
        self._batches = batches
        self._uint8 = pixels
        self._decoded = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        self._processor = VaeImageProcessor()
        self._clip = CLIPImageProcessor()
        self._names = (folder / str(number) for number in itertools.count())

    def plain(self) -> None:
        """As the end of the pipeline's call, and what the reference script does with its result."""
        out = next(self._names)
        out.mkdir()
        for batch in range(self._batches):
            images = self._processor.postprocess(self._decoded, output_type="pil", do_denormalize=[True] * _BATCH)
            for place, image in enumerate(images):
                image.save(out / f"{batch}-{place}.jpg")

    def safety(self) -> None:
        """What `run_safety_checker` prepares for a checker, patched to look away or not."""
        for _ in range(self._batches):
            images = self._processor.postprocess(self._decoded, output_type="pil")
            self._clip(images, return_tensors="pt")

    def ours(self) -> None:
        """From uint8 on the device to the members of an open shard; its one commit is not per image."""
        out = next(self._names)
        out.mkdir()
        writer = ShardWriter(open_storage(str(out)), 0, generator="bench", labelled=False)
        for batch in range(self._batches):
            # On a CPU `.cpu()` hands over the tensor itself: the clone stands for the copy from a device.
            for place, pixels in enumerate(self._uint8.clone().cpu().numpy()):
                height, width, _ = pixels.shape
                image = EncodedVariation(data=encode(pixels, _QUALITY), width=width, height=height, seed=place)
                writer.add(Sample(key=f"{batch}-{place}", synthetic=[image]))
        writer.discard()

    def hand_over(self) -> None:
        """The part of ours that the device's own thread does."""
        for _ in range(self._batches):
            self._uint8.clone().cpu().numpy()
