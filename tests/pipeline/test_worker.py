"""The worker on a real generator: batches, memory that runs out, images that are not finite, safety."""

import contextlib
from dataclasses import replace

import pytest
import torch

from manifests.catalog import merge, read_part
from manifests.plan import claim
from manifests.schema import facts_of
from manifests.storage import open_storage
from pipeline.batching import automatic_batch, is_out_of_memory
from pipeline.events import Committed, Failed, Made, Note
from pipeline.generators.base import GeneratorConfig
from pipeline.generators.sd_variations import SDVariations
from pipeline.job import Job, Tasks, make_plan
from pipeline.sources.folder import FolderSource
from pipeline.worker import NON_FINITE, UNSAFE, Worker
from tests.conftest import rows_of

CPU = torch.device("cpu")


class SmallMemory(SDVariations):
    """A device that holds batches of two."""

    def vary(self, condition, seeds):
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().vary(condition, seeds)


class Overflowing(SDVariations):
    """Seeds below a bound give NaN, in half precision only or always."""

    bound, always, precise = 2**61, False, False

    def vary(self, condition, seeds):
        made = super().vary(condition, seeds)
        bad = torch.tensor([seed < self.bound and (self.always or not self.precise) for seed in seeds])
        return replace(made, images=torch.where(bad[:, None, None, None], 0, made.images), finite=~bad)

    @contextlib.contextmanager
    def full_precision(self):
        self.precise = True
        yield
        self.precise = False


class Prudish(SDVariations):
    """Flags every second image of a batch."""

    def flagged(self, images):
        return torch.arange(len(images)) % 2 == 1


@pytest.fixture
def make(tiny_model, photos, tmp_path):
    """Make a set with a generator class: `make(cls, batch_size=8, ...)` returns folder, worker and events."""

    def call(cls, *, batch_size=8, variations=1, shards=3, name="set", **config):
        folder = str(tmp_path / name)
        settings = GeneratorConfig(model=tiny_model, **config)
        generator = cls.load(replace(settings, safety="off"), CPU)
        source = FolderSource(photos)
        index = source.index()
        plan = make_plan(
            index=index, source={"kind": "folder", "location": photos, "fingerprint": ""}, generator=generator.spec,
            seed=0, variations=variations, shards=shards, limit=None, store_real="original", quality=90,
            max_pixels=10**8,
        )  # fmt: skip
        storage = open_storage(folder)
        storage.create_folder()
        claim(storage, plan)
        job = Job(out=folder, plan=plan, source=source, generator=settings, generator_name="sd-variations")
        events = []
        worker = Worker(job, generator, batch_size, events.append)
        worker.run(map(Tasks.of(plan, index).task, range(plan.shards)))
        merge(storage, plan)
        return folder, worker, events

    return call


def batch_sizes(folder, shards=3):
    storage = open_storage(folder)
    return [facts_of(read_part(storage, shard).schema, "part").batch_size for shard in range(shards)]


def images(folder):
    return {row["key"]: [image["sha256"] for image in row["synthetic"]] for row in rows_of(folder)}


def test_events_tell_what_happened(make):
    _, _, events = make(SDVariations)
    assert sum(event.variations for event in events if isinstance(event, Made)) == 23
    assert [event.shard for event in events if isinstance(event, Committed)] == [0, 1, 2]


def test_the_batch_is_at_most_the_largest_shards_variations(make):
    folder, worker, _ = make(SDVariations, batch_size=64)
    assert worker.batch_size == 8
    assert batch_sizes(folder) == [8, 8, 8]


def test_out_of_memory_halves_the_batch_for_good_and_loses_nothing(make):
    folder, worker, events = make(SmallMemory)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 2
    assert "batch size is now 2" in notes[1]
    assert worker.batch_size == 2
    assert batch_sizes(folder) == [2, 2, 2]
    undisturbed, _, _ = make(SDVariations, batch_size=2, name="undisturbed")
    assert rows_of(folder) == rows_of(undisturbed)


def test_out_of_memory_with_one_image_is_an_error(make):
    class NoMemory(SDVariations):
        def vary(self, condition, seeds):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    with pytest.raises(RuntimeError, match="allocate"):
        make(NoMemory)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 16])
def test_variations_of_a_row_may_lie_in_several_batches(make, batch_size):
    folder, _, _ = make(SDVariations, batch_size=batch_size, variations=3)
    rows = rows_of(folder)
    assert len(rows) == 23
    assert all(len({row["synthetic"][k]["sha256"] for k in range(3)}) == 3 for row in rows)


def test_nonfinite_images_are_made_again_in_float32_and_counted(make):
    folder, _, _ = make(Overflowing)
    expected, _, _ = make(SDVariations, name="expected")
    assert images(folder) == images(expected)
    storage = open_storage(folder)
    redone = sum(facts_of(read_part(storage, shard).schema, "part").nonfinite_redone for shard in range(3))
    assert redone == sum(row["synthetic"][0]["seed"] < 2**61 for row in rows_of(folder)) > 0


def test_images_that_stay_nonfinite_fail_their_row(make):
    class Hopeless(Overflowing):
        always = True

    folder, _, events = make(Hopeless)
    rows = rows_of(folder)
    failed = [row for row in rows if row["status"] == "failed"]
    assert 0 < len(failed) < 23
    assert {row["error"] for row in failed} == {NON_FINITE}
    assert all(row["real"] is None and row["synthetic"] == [] for row in failed)
    assert {event.key for event in events if isinstance(event, Failed)} == {row["key"] for row in failed}
    expected = images(make(SDVariations, name="expected")[0])
    assert all(images(folder)[row["key"]] == expected[row["key"]] for row in rows if row["status"] == "ok")


def test_flagging_is_a_column_and_dropping_fails_the_row(make):
    flagged, _, _ = make(Prudish, safety="flag")
    marks = [row["synthetic"][0]["flagged"] for row in rows_of(flagged)]
    assert set(marks) == {True, False}
    dropped, _, _ = make(Prudish, safety="drop", name="dropped")
    assert [row["error"] for row in rows_of(dropped)] == [UNSAFE if mark else None for mark in marks]
    kept = images(dropped)
    assert all(kept[key] == found for key, found in images(flagged).items() if kept[key])


def test_automatic_batches_are_fixed_on_a_cpu():
    sizes = (32, 64, 128, 256, 512, 1024)
    assert [automatic_batch(CPU, size, 10**6) for size in sizes] == [64, 16, 4, 1, 1, 1]


def test_automatic_batches_are_as_equal_as_the_shard_allows():
    assert [automatic_batch(CPU, 32, images) for images in (1, 64, 65, 150, 180)] == [1, 64, 33, 50, 60]


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_out_of_memory(error, answer):
    assert is_out_of_memory(error) is answer
