"""`status`, `verify`, `repair` and `reproduce`: what a set holds, whether it is sound, and how to mend it."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from manifests import layout
from manifests.catalog import Catalog, committed_shards, is_manifest_current, merge, read_part
from manifests.errors import CorruptSetError, StorageError, UsageError
from manifests.plan import Plan, differences, read_plan
from manifests.schema import OK, PairRow, ShardFacts, facts_of, table_to_rows
from manifests.storage import Storage, open_storage
from manifests.verify import is_intact, verify
from pipeline.card import write_card
from pipeline.failed_rows import FailedRows, failed_lines, failed_rows
from pipeline.generate import noise_index
from pipeline.job import Job, ShardTask, Tasks
from pipeline.sources.base import fingerprint

if TYPE_CHECKING:
    from pipeline.generate import Maker
    from pipeline.generators.base import Generator, GeneratorConfig


_OF_SOURCE = ["key", "status", "source", "label", "class_name"]


def read_parts(storage: Storage, plan: Plan) -> Iterator[tuple[int, ShardFacts, pa.Table]]:
    """Every readable part: shard number, facts and rows. Damaged parts are passed over; `verify` names them."""
    for shard in sorted(committed_shards(storage, plan)):
        with contextlib.suppress(CorruptSetError, StorageError):
            table = read_part(storage, shard)
            yield shard, facts_of(table.schema, layout.part_name(shard)), table


def status(url: str) -> dict[str, Any]:
    """How far a set is: shards, rows by state, speed of one worker, workers at work, seconds to go (None: unknown)."""
    storage = open_storage(url)
    plan = read_plan(storage)
    done = ok = 0
    failed = FailedRows()
    rates = []
    for _, facts, rows in read_parts(storage, plan):
        done += 1
        ok += len(rows)
        failed.add(rows)
        if facts.seconds > 0:
            rates.append(len(rows) * max(1, plan.variations) / facts.seconds)
    writers = len({name for name in storage.being_written() if layout.shard_of(name, "tar") is not None})
    rate = statistics.median(rates) if rates else None
    left = (plan.rows - ok) * max(1, plan.variations)
    return {
        "url": storage.url,
        "shards_done": done,
        "shards": plan.shards,
        "rows": plan.rows,
        "rows_ok": ok - len(failed),
        "rows_failed": failed.by_reason(),
        "failed_examples": failed.examples(),
        "workers_now": writers,
        "images_per_second_per_worker": None if rate is None else round(rate, 2),
        "eta_seconds": round(left / (rate * writers)) if rate and writers and left else (0 if not left else None),
        "merged": storage.exists(layout.MANIFEST),
    }


def status_text(facts: dict[str, Any]) -> str:
    """`status` for people."""
    rate, eta = facts["images_per_second_per_worker"], facts["eta_seconds"]
    lines = [
        f"{facts['url']}: {facts['shards_done']} of {facts['shards']} shards" + (", merged" if facts["merged"] else ""),
        f"rows: {facts['rows_ok']:,} ok, {sum(facts['rows_failed'].values()):,} failed, of {facts['rows']:,}",
        *failed_lines(facts["rows_failed"], facts["failed_examples"]),
        f"images/s per worker: {'unknown yet' if rate is None else rate}; workers on this set: {facts['workers_now']}",
    ]
    if eta != 0:
        lines.append("time to go: " + ("unknown: nobody works on it" if eta is None else f"{eta / 3600:.2f} h"))
    return "\n".join(lines)


def verify_set(url: str) -> dict[str, Any]:
    """`manifests.verify` as plain values: counts, and each problem with the keys of the rows that are hurt."""
    storage = open_storage(url)
    report = verify(storage, read_plan(storage))
    return {
        "url": storage.url,
        "sound": not report.problems,
        "shards": report.shards,
        "rows_ok": report.rows_ok,
        "rows_failed": report.rows_failed,
        "problems": [asdict(problem) for problem in report.problems],
    }


def verify_text(facts: dict[str, Any]) -> str:
    """`verify` for people: the bad files by name, at most ten hurt keys each."""
    failed = sum(facts["rows_failed"].values())
    if facts["sound"]:
        return f"{facts['url']} is sound: {facts['shards']} shards, {facts['rows_ok']:,} rows ok, {failed:,} failed"
    lines = []
    for problem in facts["problems"]:
        keys = problem["keys"]
        more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
        lines.append(f"{problem['file']}: {problem['reason']}" + (f": {', '.join(keys[:10])}{more}" if keys else ""))
    lines.append(f"{len(facts['problems'])} problems; `pipeline repair {facts['url']}` makes bad shards again")
    return "\n".join(lines)


def repair(url: str, *, source: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Make bad shards and failed rows again, and nothing else; intact images of such shards are kept byte for byte.

    Returns the shards that were made again, the rows that fail still (by reason) and the problems that are left for
    the user, such as stray files.
    """
    from pipeline.engines.base import Work
    from pipeline.progress import Progress

    storage = open_storage(url)
    plan = read_plan(storage)
    storage.sweep()
    found = verify(storage, plan)
    shards = sorted({*found.bad_shards, *found.shards_with_failed_rows})
    if shards:
        maker = _maker(url, plan, source, model)
        tasks = _tasks(storage, plan, maker.index)
        progress = Progress(plan, plan.shards - len(shards), Counter(), plan.rows)

        def again(shard: int) -> ShardTask:  # one at a time: all rows of a large set would not fit the memory
            return tasks.task(shard, _intact_rows(storage, shard), replace=True)

        for batch_size, group in _by_batch_size(storage, plan, shards).items():
            job = replace(maker.job, batch_size=batch_size)
            maker.make(job, Work(storage=storage, shards=group, task=again, replace=True), progress)
        progress.close()
    if not is_manifest_current(storage, plan):
        merge(storage, plan)
        write_card(storage, plan)
    after = verify(storage, plan)
    failed = failed_rows(storage, after.shards_with_failed_rows)
    return {
        "url": storage.url,
        "shards_made_again": shards,
        "rows_ok": after.rows_ok,
        "rows_failed": failed.by_reason(),
        "failed_examples": failed.examples(),
        "problems": [f"{problem.file}: {problem.reason}" for problem in after.problems],
    }


def repair_text(facts: dict[str, Any]) -> str:
    """`repair` for people."""
    again = facts["shards_made_again"]
    written = f"wrote shards again: {', '.join(map(str, again))}; their intact images were kept byte for byte"
    lines = [written if again else "every shard was sound"]
    lines += failed_lines(facts["rows_failed"], facts["failed_examples"])
    lines += [f"left for you: {problem}" for problem in facts["problems"]]
    lines.append(f"{facts['url']}: {facts['rows_ok']:,} rows ok")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """What makes rows of an existing plan again; `generator` is None for packed sets."""

    job: Job
    index: pa.Table
    make: Maker
    generator: Generator | None = None


def _maker(url: str, plan: Plan, source: str | None, model: str | None) -> _Maker:
    from pipeline.engines.local import LocalEngine
    from pipeline.generators.base import GeneratorConfig
    from pipeline.generators.load import load_generator
    from pipeline.pack import PackEngine, Packing
    from pipeline.sources.open import open_source

    if plan.generator is None:
        packing = Packing.open(source or plan.source["location"], plan.source["synthetic"])
        job = Job(out=url, plan=plan, source=None, generator=GeneratorConfig(model=""), generator_name="")
        return _Maker(job=job, index=packing.index, make=PackEngine(packing).run)
    config = _config_of(plan.generator, model)
    name = plan.generator["generator"]
    engine = LocalEngine(workers=1)
    generator = load_generator(config, engine.device, name)
    _check_same_model(plan, generator)
    opened = None
    if plan.source["kind"] != "noise":
        opened = open_source(source or f"{plan.source['kind']}:{plan.source['location']}")
    job = Job(out=url, plan=plan, source=opened, generator=config, generator_name=name)
    index = opened.index() if opened is not None else noise_index(plan.rows)
    return _Maker(job=job, index=index, make=partial(engine.run, generator=generator), generator=generator)


def _config_of(spec: Mapping[str, Any], model: str | None) -> GeneratorConfig:
    """The settings that resolve to `spec` again, with the model where it is now."""
    from pipeline.generators.base import GeneratorConfig
    from pipeline.generators.schedulers import SCHEDULERS

    wanted = (spec["scheduler"], spec.get("scheduler_options", {}))
    named = [name for name, entry in SCHEDULERS.items() if entry == wanted and entry[1]]
    names = ("revision", "steps", "guidance_scale", "size", "dtype", "conditioning", "safety")
    return GeneratorConfig(
        model=model or spec["model"],
        scheduler=named[0] if named else spec["scheduler"],
        **{name: spec[name] for name in names if name in spec},
    )


def _check_same_model(plan: Plan, generator: Generator) -> None:
    now = replace(plan, generator=generator.spec)
    if now.generator_id != plan.generator_id:
        listed = "; ".join(f"{name}: {old!r} in the set, {new!r} now" for name, old, new in differences(plan, now))
        raise UsageError(f"the model is not the one that made the set ({listed}); give the original with --model")


def _tasks(storage: Storage, plan: Plan, index: pa.Table) -> Tasks:
    """The plan's tasks from its source as it is now: files may have been mended, deleted or added meanwhile.

    Raises `UsageError` if the source is another one: if a committed shard would hold other keys.
    """
    if fingerprint(index) == plan.source["fingerprint"]:
        return Tasks.of(plan, index)
    index = _as_planned(storage, plan, index)
    tasks = Tasks.of(plan, index)
    same = 0
    for shard, _, rows in read_parts(storage, plan):
        if index.num_rows < plan.rows or not tasks.task(shard).rows["key"].equals(rows["key"]):
            raise UsageError(
                f"the source is not the one that the set was made of ({index.num_rows:,} images; shard {shard} would "
                "hold other keys). Give the original images with --source"
            )
        same += 1
    if not same:
        raise UsageError(
            f"the source is not as it was when {storage.url} was planned ({index.num_rows:,} images), and no shard is "
            "left to compare it with. Give the original images with --source"
        )
    return tasks


def _as_planned(storage: Storage, plan: Plan, index: pa.Table) -> pa.Table:
    """The index with rows for failed images that were deleted since, and where all is known without added ones."""
    parts = [rows.select(_OF_SOURCE) for _, _, rows in read_parts(storage, plan)]
    if not parts or plan.source["kind"] not in ("folder", "pack"):
        return index
    known = pa.concat_tables(parts).replace_schema_metadata(None)
    gone = known.filter(pc.invert(pc.is_in(known["key"], index["key"])))
    lost = gone.filter(pc.equal(gone["status"], OK))
    if len(lost):
        raise UsageError(
            f"the source is not the one that the set was made of: {len(lost):,} of its images are not there, such as "
            f"{lost['source'][0]}. Give the original images with --source"
        )
    if len(known) == plan.rows:
        index = index.filter(pc.is_in(index["key"], known["key"]))
    columns = [gone["key"], gone["source"], gone["label"], gone["class_name"], *[pa.nulls(len(gone), pa.int64())] * 2]
    return pa.concat_tables([index, pa.table(columns, schema=index.schema)]).sort_by("key")


def _by_batch_size(storage: Storage, plan: Plan, shards: list[int]) -> Mapping[int | None, list[int]]:
    """Each shard is made again at the batch size it was made with; where that is lost, at the set's first."""
    sizes: dict[int, int] = {shard: facts.batch_size for shard, facts, _ in read_parts(storage, plan)}
    default = next(iter(sizes.values()), None)
    groups: defaultdict[int | None, list[int]] = defaultdict(list)
    for shard in shards:
        groups[sizes.get(shard, default) or None].append(shard)
    return groups


def _intact_rows(storage: Storage, shard: int) -> dict[str, PairRow]:
    try:
        rows = table_to_rows(read_part(storage, shard))
        with storage.open(layout.tar_name(shard)) as tar:
            return {row.key: row for row in rows if row.status == OK and is_intact(tar, row)}
    except (CorruptSetError, StorageError):
        return {}


def reproduce(
    url: str, key: str, *, source: str | None = None, model: str | None = None, save: Path | None = None
) -> dict[str, Any]:
    """Make the variations of one row again, at its batch size and places, and compare them with the stored ones.

    Distances are of decoded pixels, 0 to 255. `save`: a folder for the images made again.
    """
    from pipeline.engines.base import make_worker

    catalog = Catalog.open(url)
    plan, row = catalog.plan, catalog.row(key)
    if row.status != OK:
        raise CorruptSetError(f"{key} is a failed row ({row.error}); `pipeline repair` makes it again")
    maker = _maker(url, plan, source, model)
    if maker.generator is None:
        raise UsageError(f"{url} was packed from existing images: there is no generator to run again")
    tasks = _tasks(catalog.storage, plan, maker.index)
    task: ShardTask = tasks.task(row.shard)
    facts = facts_of(read_part(catalog.storage, row.shard).schema, layout.part_name(row.shard))
    worker = make_worker(replace(maker.job, batch_size=facts.batch_size), maker.generator, lambda event: None)
    made = worker.remake(task, task.rows["key"].to_pylist().index(key))
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(made):
            (save / layout.synthetic_member(key, index)).write_bytes(image.data)
    stored = [catalog.image(row, image) for image in row.synthetic]
    return {
        "key": key,
        "shard": row.shard,
        "batch_size": facts.batch_size,
        "made_on": facts.device,
        "variations": [_compare(old, new.data) for old, new in zip(stored, made, strict=True)],
    }


def _compare(stored: bytes, again: bytes) -> dict[str, Any]:
    distance = np.abs(_pixels(stored) - _pixels(again))
    return {
        "same_bytes": stored == again,
        "mean_distance": round(float(distance.mean()), 4),
        "max_distance": int(distance.max()),
    }


def _pixels(data: bytes) -> NDArray[np.int16]:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


def reproduce_text(facts: dict[str, Any]) -> str:
    """`reproduce` for people."""
    lines = [f"{facts['key']}: shard {facts['shard']}, batch size {facts['batch_size']}, made on {facts['made_on']}"]
    for index, found in enumerate(facts["variations"]):
        same = "the same bytes" if found["same_bytes"] else "other bytes"
        lines.append(
            f"  variation {index}: {same}; pixel distance mean {found['mean_distance']}, max {found['max_distance']}"
        )
    return "\n".join(lines)
