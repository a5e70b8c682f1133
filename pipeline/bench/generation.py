"""Images per second: the real worker writing a real pair set, against the plain diffusers loop on the same pictures.

Loading the model and the first, warming batch are left out on both sides; everything else counts: reading, the stored
real image, similarity, hashes, the safe commit of every shard.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from manifests.storage import open_storage
from pipeline.batching import automatic_batch
from pipeline.bench.figures import Figure, Goal, Say, Settings, Times, in_turns
from pipeline.bench.pictures import write_digits, write_pictures
from pipeline.bench.plain_loop import PlainLoop
from pipeline.engines.base import make_worker
from pipeline.engines.local import devices
from pipeline.events import Event, Made, Note
from pipeline.generators.base import Generator, GeneratorConfig, Variations, noise
from pipeline.generators.sd_variations import SDVariations
from pipeline.job import Job, Tasks, make_plan
from pipeline.sources.base import fingerprint
from pipeline.sources.folder import FolderSource

_SHARDS = 2  # the border between shards is part of the work
_ROUNDS_ON_GPU = 3  # minutes each
_CPU = torch.device("cpu")

EQUAL_BATCH, OWN_BATCH = Goal(bound=1.15), Goal(bound=1.3)
GREY_LEVELS = Goal(bound=1, of="ours", at_least=False)
BUSY = Goal(bound=97, of="ours")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model with its settings, run by us and by diffusers."""

    name: str
    generator: SDVariations
    pipeline: Any  # the same weights in diffusers' own StableDiffusionImageVariationPipeline
    images: int
    write: Callable[[Path, int], None]  # fills a folder with that many real images
    rounds: int = 5
    count_flops: bool = False


def measure(settings: Settings, say: Say) -> list[Figure]:
    """Every case of the settings in turn; only one model is in memory at a time."""
    return [figure for case in cases(settings, say) for figure in measure_case(case, settings, say)]


def cases(settings: Settings, say: Say) -> Iterator[Case]:
    """The model asked for, or random weights of the real architecture, or the two small CPU models with goals."""
    device = devices(None)[0]
    if settings.model is not None:
        yield _model_case(settings, settings.model, device)
    elif settings.random_weights:
        from pipeline.generators.random_weights import random_sd_variations

        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        yield from random_cases(random_sd_variations(device, dtype), settings, device)
    else:
        yield from _small_cases(settings, say)


def _small_cases(settings: Settings, say: Say) -> Iterator[Case]:
    """On the CPU wherever we are: their goals are for one CPU process."""
    from pipeline.embedded import checkpoint_path
    from pipeline.generators.random_weights import tiny_variations

    if checkpoint_path().is_dir():
        yield _model_case(settings, str(checkpoint_path()), _CPU, name="embedded", write=write_digits)
    else:
        say(f"skipped: there is no embedded checkpoint at {checkpoint_path()}")
    pipeline = tiny_variations("64px")
    config = _config("random-64px", settings, steps=settings.steps or 5)
    yield Case(
        name="tiny 64 px",
        generator=SDVariations.from_pipeline(pipeline, config, _CPU),
        pipeline=pipeline,
        images=_images(settings, 64),
        write=partial(write_pictures, side=settings.size or 64),
        rounds=settings.round_count(),
    )


def _model_case(
    settings: Settings,
    model: str,
    device: torch.device,
    name: str = "model",
    write: Callable[[Path, int], None] | None = None,
) -> Case:
    from diffusers import StableDiffusionImageVariationPipeline

    from pipeline.generators.checkpoint import fetch

    config = _config(model, settings)
    generator = SDVariations.load(config, device)
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(
        fetch(config).folder, safety_checker=None, requires_safety_checker=False
    ).to(device)
    if generator.dtype != torch.float32:
        pipeline.to(generator.dtype)
    return Case(
        name=name,
        generator=generator,
        pipeline=pipeline,
        images=_images(settings, 256 if generator.size <= 32 else 64),
        write=write or partial(write_pictures, side=generator.size),
        rounds=settings.round_count(5 if device.type == "cpu" else _ROUNDS_ON_GPU),
    )


def random_cases(pipeline: Any, settings: Settings, device: torch.device) -> Iterator[Case]:
    """512 px and 50 steps, then half the steps, then half the size; or just what the settings name."""
    asked = settings.steps is not None or settings.size is not None
    native = pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    size, steps = settings.size or native, settings.steps or 50
    for case_size, case_steps in [(size, steps)] if asked else [(size, steps), (size, steps // 2), (size // 2, steps)]:
        config = _config("random-weights", settings, steps=case_steps, size=case_size)
        generator = SDVariations.from_pipeline(pipeline, config, device)
        yield Case(
            name=f"random weights, {case_size} px, {generator.steps} steps, guidance {generator.guidance_scale:g}, "
            f"{str(generator.dtype).removeprefix('torch.')}",
            generator=generator,
            pipeline=pipeline,
            images=_images(settings, 128),
            write=partial(write_pictures, side=case_size),
            rounds=settings.round_count(5 if device.type == "cpu" else _ROUNDS_ON_GPU),
            count_flops=True,
        )


def _config(model: str, settings: Settings, steps: int | None = None, size: int | None = None) -> GeneratorConfig:
    return GeneratorConfig(
        model=model,
        revision=settings.revision,
        steps=steps or settings.steps,
        guidance_scale=settings.guidance_scale,
        size=size or settings.size,
    )


def _images(settings: Settings, default: int) -> int:
    return settings.images or (default // 2 if settings.quick else default)


def measure_case(case: Case, settings: Settings, say: Say) -> list[Figure]:
    """Worker and plain loop in turns over the same files."""
    say(f"{case.name}: {case.images} images, {case.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="diffmix-bench-") as folder:
        return _Comparison(case, settings.batch_size, Path(folder), say).figures()


class _Comparison:
    """One case over one folder of pictures; every run writes to a fresh folder."""

    def __init__(self, case: Case, batch_size: int, folder: Path, say: Say) -> None:
        self.case, self.batch_size, self.say = case, batch_size, say
        self._out = (folder / f"out-{number}" for number in itertools.count())
        case.write(folder / "real", case.images)
        self.files = sorted((folder / "real").iterdir())
        self.plain = PlainLoop(case.pipeline, case.generator, batch_size)
        self.source = FolderSource(str(folder / "real"))
        index = self.source.index()
        self.plan = make_plan(
            index=index,
            source={"kind": "folder", "location": self.source.location, "fingerprint": fingerprint(index)},
            generator=case.generator.spec,
            seed=0,
            variations=1,
            shards=_SHARDS,
            limit=None,
            store_real="original",
            quality=90,
            max_pixels=100_000_000,
        )
        self.tasks = Tasks.of(self.plan, index)
        self.own_batch = automatic_batch(case.generator.device, case.generator.size, self.plan.largest_shard)
        self.watches: list[_Watch] = []

    def figures(self) -> list[Figure]:
        """All that is said of the case."""
        own, equal = f"batch {self.own_batch} (automatic)", f"batch {self.batch_size}"
        runs: dict[str, Callable[[], None]] = {own: lambda: self._worker(self.own_batch), "plain": self._plain}
        if self.own_batch != self.batch_size:
            runs[equal] = lambda: self._worker(self.batch_size)
        for batch_size in {self.own_batch, self.batch_size}:
            self._worker(batch_size, shards=1)
        self._plain(images=self.batch_size)
        self.watches.clear()
        times = in_turns(self.case.rounds, runs, self.say)
        rate = self.case.images / times[own].median
        figures = [self._rate(own, times, OWN_BATCH, f"`pipeline plan --rate {rate:.3g}`")]
        if equal in times:
            figures.append(self._rate(equal, times, EQUAL_BATCH))
        return [*figures, self._difference(), *self._busy(), *self._flops(rate)]

    def _rate(self, name: str, times: dict[str, Times], goal: Goal, note: str | None = None) -> Figure:
        ratio, spread = times[name].speedup(times["plain"])
        return Figure(
            name=f"{self.case.name}, {name}",
            ours=self.case.images / times[name].median,
            unit="images/s",
            baseline=self.case.images / times["plain"].median,
            baseline_name=f"plain diffusers loop, batch {self.batch_size}",
            ratio=ratio,
            spread=spread,
            goal=goal,
            note=note,
        )

    def _worker(self, batch_size: int, shards: int = _SHARDS) -> None:
        out = str(next(self._out))
        open_storage(out).create_folder()
        generator = _Timed(self.case.generator)
        job = Job(
            out=out,
            plan=self.plan,
            source=self.source,
            generator=GeneratorConfig(model=""),
            generator_name="",
            batch_size=batch_size,
        )
        watch = _Watch(generator, self.say)
        worker = make_worker(job, cast(Generator, generator), watch)
        worker.run(self.tasks.task(shard) for shard in range(min(shards, self.plan.shards)))
        if batch_size == self.own_batch:
            self.watches.append(watch)

    def _plain(self, images: int | None = None) -> None:
        self.plain.run(self.files[:images], next(self._out))

    def _difference(self) -> Figure:
        """From the same latents, before encoding, our pictures and the pipeline's."""
        generator = self.case.generator
        seeds = range(min(self.batch_size, len(self.files)))
        files = [self.files[seed] for seed in seeds]
        ours = _our_pictures(generator, files, seeds)
        edge = generator.size // generator.vae_factor
        latents = noise(seeds, (generator.unet.config.in_channels, edge, edge))
        pictures = self.plain.pictures(self.plain.inputs(files), latents)
        theirs = torch.stack(
            [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
        )
        apart = (ours.reshape(theirs.shape).int() - theirs.int()).abs()
        return Figure(
            name=f"{self.case.name}, pictures from the same latents, largest difference",
            ours=float(apart.max()),
            unit="grey levels",
            # Half precision rounds our float32 latents and the pipeline's half-precision ones apart.
            goal=GREY_LEVELS if generator.dtype == torch.float32 else None,
            note=f"{float((apart > 0).float().mean()):.2%} of the values differ",
        )

    def _busy(self) -> list[Figure]:
        shares = [share for watch in self.watches if (share := watch.shares()) is not None]
        if not shares:
            return []
        networks, device = (100 * statistics.median(values) for values in zip(*shares, strict=True))
        return [
            Figure(
                name=f"{self.case.name}, steady state inside embed, denoise and decode",
                ours=networks,
                unit="% of wall time",
                goal=BUSY,
                note=f"{device:.1f} % with similarity and safety checks",
            )
        ]

    def _flops(self, rate: float) -> list[Figure]:
        if not self.case.count_flops:
            return []
        from pipeline.bench.flops import flops_per_image, matmul_rate

        generator = self.case.generator
        per_image = flops_per_image(generator)
        achieved = per_image * rate
        peak = matmul_rate(generator.device, generator.dtype)
        return [
            Figure(
                name=f"{self.case.name}, arithmetic",
                ours=achieved / 1e12,
                unit="TFLOP/s",
                baseline=peak / 1e12,
                baseline_name="this device's measured matrix product",
                ratio=achieved / peak,
                note=f"{per_image / 1e12:.3g} TFLOP an image, counted by torch.utils.flop_counter",
            )
        ]


def _our_pictures(generator: SDVariations, files: Sequence[Path], seeds: Sequence[int]) -> torch.Tensor:
    from pipeline.sources.images import decode

    inputs = [generator.prepare(decode(file.read_bytes(), max_pixels=100_000_000)) for file in files]
    return generator.vary(generator.embed(torch.stack(inputs)), seeds).images.cpu()


class _Timed:
    """A generator whose time in `embed` and `vary` is measured; otherwise the generator itself."""

    def __init__(self, generator: SDVariations) -> None:
        self._generator = generator
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        with self._clock():
            return self._generator.embed(inputs)

    def vary(self, condition: torch.Tensor, seeds: Sequence[int]) -> Variations:
        with self._clock():
            return self._generator.vary(condition, seeds)

    def _clock(self) -> _Clock:
        return _Clock(self)


class _Clock:
    def __init__(self, timed: _Timed) -> None:
        self._timed = timed

    def __enter__(self) -> None:
        _synchronize(self._timed.device)
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        _synchronize(self._timed.device)
        self._timed.seconds += time.perf_counter() - self._started


@dataclass(slots=True)
class _Watch:
    """Takes a worker's events; steady state is from the end of the first batch to the end of the last."""

    generator: _Timed
    say: Say
    batches: list[tuple[float, float, float]] = field(default_factory=list)  # wall clock, networks, device: all so far

    def __call__(self, event: Event) -> None:
        if isinstance(event, Made):
            device = self.batches[-1][2] if self.batches else 0.0
            self.batches.append((time.perf_counter(), self.generator.seconds, device + event.device_seconds))
        elif isinstance(event, Note):
            self.say(event.text)

    def shares(self) -> tuple[float, float] | None:
        """Of the wall time: inside the networks, and in all that the worker calls device work; None for one batch."""
        if len(self.batches) < 2:
            return None
        wall, networks, device = (last - first for first, last in zip(self.batches[0], self.batches[-1], strict=True))
        return networks / wall, device / wall


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
