"""`pipeline generate` and `pipeline plan`: from settings to a committed, merged, documented pair set."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from manifests import layout
from manifests.catalog import committed_shards, is_manifest_current, merge, read_part
from manifests.errors import CorruptSetError, DiffmixError, UsageError
from manifests.plan import Plan, claim
from manifests.schema import facts_of
from manifests.storage import Storage, open_storage
from pipeline.card import write_card
from pipeline.engines import ENGINES
from pipeline.events import Event
from pipeline.failed_rows import FailedRows, failed_rows
from pipeline.job import Job, Tasks, check_folder, make_plan
from pipeline.progress import Progress
from pipeline.sources.base import INDEX_SCHEMA, Source, fingerprint

if TYPE_CHECKING:
    import torch

    from pipeline.engines.base import Engine, Work
    from pipeline.generators.base import Generator, GeneratorConfig

Maker = Callable[[Job, "Work", Callable[[Event], None]], None]  # an engine's `run` with its generator, or a packing

_ROUNDS = 3  # how often shards that a second run's race took back are made again


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `pipeline generate`, resolved by the command line but not yet against data or model."""

    source: str | None  # None: an unconditional generator with `count` images
    out: str
    generator: GeneratorConfig
    generator_name: str = "auto"
    shards: int = 8
    variations: int = 1
    seed: int = 0
    limit: int | None = None
    count: int | None = None
    store_real: str = "original"
    quality: int = 90
    max_pixels: int = 100_000_000
    batch_size: int | None = None
    engine: str = "auto"
    workers: int | None = None
    max_failures: str = "5%"
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Settings after looking at the source and loading the model."""

    source: Source | None
    index: pa.Table
    plan: Plan
    generator: Generator


def passed_over(kind: str, count: int) -> str:
    """What a source's `ignored` counts, in words."""
    what = "failed rows of the source set" if kind == "pairs" else "files that are no images by their name"
    return f"passed over: {count:,} {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did, for the summary and the exit code."""

    plan: Plan
    made_shards: int
    variations: int
    seconds: float
    rows_ok: int
    failed: FailedRows
    ignored: int
    url: str

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "url": self.url,
            "shards": self.plan.shards,
            "shards_made": self.made_shards,
            "rows": self.plan.rows,
            "rows_ok": self.rows_ok,
            "rows_failed": self.failed.by_reason(),
            "failed_examples": self.failed.examples(),
            "files_ignored": self.ignored,
            "images_made": self.variations,
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.variations / self.seconds, 2) if self.seconds else None,
        }

    def text(self) -> str:
        """For people."""
        if not self.made_shards:
            lines = [f"{self.url} is complete: {self.rows_ok:,} pairs in {self.plan.shards} shards; nothing to do"]
        else:
            speed = f", {self.variations / self.seconds:.1f} images/s" if self.variations and self.seconds else ""
            lines = [f"{self.rows_ok:,} pairs in {self.plan.shards} shards at {self.url} ({self.seconds:.0f} s{speed})"]
        if self.failed:
            lines += [
                *self.failed.lines(),
                f"mend these files, under the same names, and run `pipeline repair {self.url}`",
            ]
        if self.ignored:
            lines.append(passed_over(self.plan.source["kind"], self.ignored))
        return "\n".join(lines)


def prepare(settings: Settings, device: torch.device) -> Prepared:
    """Index the source, load the generator on `device`, and make the plan of both."""
    from pipeline.generators.load import load_generator
    from pipeline.sources.open import open_source

    # The source first: a wrong path should not have to wait for gigabytes of weights.
    source = open_source(settings.source) if settings.source is not None else None
    index = source.index() if source is not None else noise_index(settings.count)
    generator = load_generator(settings.generator, device, settings.generator_name)
    if generator.conditional != (settings.source is not None):
        raise UsageError(
            "--count is for unconditional models; give --source, the images to vary"
            if generator.conditional
            else f"{settings.generator.model} makes images from noise alone: give --count N instead of --source"
        )
    plan = make_plan(
        index=index,
        source=_source_entry(source, index),
        generator=generator.spec,
        seed=settings.seed,
        variations=settings.variations,
        shards=settings.shards,
        limit=settings.limit,
        store_real=settings.store_real if source is not None else None,
        quality=settings.quality,
        max_pixels=settings.max_pixels,
    )
    return Prepared(source=source, index=index, plan=plan, generator=generator)


def generate(settings: Settings) -> Outcome:
    """Make, or go on making, the pair set; on a finished set nothing is done.

    Raises `UsageError` or `PlanMismatchError` before anything is written, `TooManyFailuresError` beyond
    `max_failures`, `StorageError` when the target fails; committed shards stay in every case.
    """
    from pipeline.engines.ranks import RanksEngine

    max_failed_rows(settings.max_failures, 0)  # its spelling, before anything is written
    storage = open_storage(settings.out)
    engine = make_engine(settings.engine, settings.workers)
    if settings.overwrite and isinstance(engine, RanksEngine) and engine.rank.count > 1:
        raise UsageError(
            f"--overwrite is not for one of {engine.rank.count} ranks: each would delete what the others made. "
            "Give another --out, or delete the set before the ranks start"
        )
    check_folder(storage, overwrite=settings.overwrite)
    prepared = prepare(settings, engine.device)
    storage.create_folder()
    plan = claim(storage, prepared.plan)
    storage.sweep()
    job = Job(
        out=settings.out,
        plan=plan,
        source=prepared.source,
        generator=settings.generator,
        generator_name=settings.generator_name,
        batch_size=settings.batch_size or recorded_batch_size(storage, plan),
    )
    ignored = prepared.source.ignored if prepared.source else 0
    return run(
        job, prepared.index, storage, partial(engine.run, generator=prepared.generator),
        max_failures=settings.max_failures, ignored=ignored,
    )  # fmt: skip


def pack(
    *,
    real: str,
    synthetic: Sequence[str],
    out: str,
    shards: int,
    store_real: str,
    quality: int,
    seed: int,
    limit: int | None,
    max_failures: str,
    max_pixels: int,
    overwrite: bool,
) -> Outcome:
    """Pair existing images; resumes, refuses and finishes as `generate` does."""
    from pipeline.generators.base import GeneratorConfig
    from pipeline.pack import PackEngine, Packing

    max_failed_rows(max_failures, 0)  # its spelling, before anything is written
    storage = open_storage(out)
    check_folder(storage, overwrite=overwrite)
    packing = Packing.open(real, synthetic)
    plan = packing.plan(
        seed=seed, shards=shards, limit=limit, store_real=store_real, quality=quality, max_pixels=max_pixels
    )
    storage.create_folder()
    plan = claim(storage, plan)
    storage.sweep()
    job = Job(out=out, plan=plan, source=None, generator=GeneratorConfig(model=""), generator_name="")
    ignored = packing.real.ignored + packing.unpaired()
    return run(job, packing.index, storage, PackEngine(packing).run, max_failures=max_failures, ignored=ignored)


def run(
    job: Job, index: pa.Table, storage: Storage, make: Maker, *, max_failures: str = "100%", ignored: int = 0
) -> Outcome:
    """Have `make` make the open shards until none is left, then merge and document the set."""
    from pipeline.engines.base import Work

    plan = job.plan
    before = committed_shards(storage, plan)
    allowed = max_failed_rows(max_failures, plan.rows)
    progress = Progress(plan, len(before), Counter(failed_rows(storage, before).by_reason()), allowed)
    tasks = Tasks.of(plan, index)
    try:
        for _ in range(_ROUNDS):
            done = committed_shards(storage, plan)
            todo = [shard for shard in range(plan.shards) if shard not in done]
            if not todo:
                break
            make(job, Work(storage=storage, shards=todo, task=tasks.task), progress)
    except BaseException:
        progress.end_line()
        storage.sweep("own")
        raise
    done = committed_shards(storage, plan)
    if len(done) < plan.shards:
        raise DiffmixError(f"{plan.shards - len(done)} shards could not be committed; run the same command again")
    if done > before:
        progress.close()
    finish(storage, plan)
    # Other ranks and runs made shards too, whose failures `progress` has not seen.
    failed = failed_rows(storage, done)
    return Outcome(
        plan=plan,
        made_shards=len(done) - len(before),
        variations=progress.variations,
        seconds=progress.seconds,
        rows_ok=plan.rows - len(failed),
        failed=failed,
        ignored=ignored,
        url=storage.url,
    )


def finish(storage: Storage, plan: Plan) -> None:
    """Merge manifest.parquet, write the data card, remove what dead runs left. Harmless to repeat."""
    if not is_manifest_current(storage, plan):
        merge(storage, plan)
        write_card(storage, plan)
    elif not storage.exists(layout.CARD):
        write_card(storage, plan)
    storage.sweep("all")


def make_engine(name: str, workers: int | None) -> Engine:
    """The engine by name; `auto` takes `ranks` where the environment says that there are several."""
    from pipeline.engines.ranks import Rank

    if name == "auto":
        name = "ranks" if Rank.from_environment(os.environ) is not None else "local"
    module, _, attribute = ENGINES[name].partition(":")
    cls = getattr(import_module(module), attribute)
    engine: Engine = cls(workers) if name == "local" else cls()
    return engine


def recorded_batch_size(storage: Storage, plan: Plan) -> int | None:
    """The batch size of the first committed shard, so that the rest of the set is made alike."""
    for shard in sorted(committed_shards(storage, plan)):
        with contextlib.suppress(CorruptSetError):  # `verify` and `repair` are for damaged parts
            return facts_of(read_part(storage, shard).schema, layout.part_name(shard)).batch_size or None
    return None


def max_failed_rows(text: str, rows: int) -> int:
    """`--max-failures`: a number of rows or a percentage of them."""
    try:
        if text.endswith("%"):
            number = float(text[:-1]) / 100
            allowed = int(number * rows)
        else:
            number = allowed = int(text)
        if number < 0:
            raise ValueError("negative")
        return allowed
    except (ValueError, OverflowError):  # the second is for an infinite percentage
        raise UsageError(f"--max-failures {text!r}: give a number of rows (100) or a percentage (5%)") from None


def noise_index(count: int | None) -> pa.Table:
    """The index of a set without real images: `count` numbered keys."""
    if count is None or count < 1:
        raise UsageError("an unconditional model needs --count N, the number of images to draw")
    columns: dict[str, Any] = {name: pa.nulls(count, INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names}
    columns["key"] = pa.array([f"{number:09d}" for number in range(count)])
    columns["location"] = pa.array([""] * count)
    return pa.table(columns, schema=INDEX_SCHEMA)


def _source_entry(source: Source | None, index: pa.Table) -> Mapping[str, Any]:
    if source is None:
        return {"kind": "noise", "location": "", "fingerprint": fingerprint(index)}
    return {"kind": source.kind, "location": source.location, "fingerprint": fingerprint(index)}
