from __future__ import annotations

import random
from pathlib import Path

import pytest

from manifests import layout
from manifests.catalog import merge
from manifests.errors import CorruptSetError
from manifests.plan import Plan, claim, read_plan
from manifests.storage import LocalStorage
from manifests.verify import intact_images, is_intact, verify
from tests.manifests.builders import FACTS, flip, make_plan, make_sample, open_writer, write_set, write_shard
from tests.manifests.test_storage import _leave_temporary


def found(storage: LocalStorage, plan: Plan) -> dict[str, str]:
    return {problem.file: problem.reason for problem in verify(storage, plan).problems}


def test_a_sound_set_has_no_problems_and_failed_rows_are_none(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    storage.write(layout.CARD, b"anything")
    report = verify(storage, plan)
    assert report.problems == [] and report.bad_shards == []
    assert (report.shards, report.rows_ok, report.rows_failed) == (2, 4, {"unreadable": 1})
    assert report.shards_with_failed_rows == [1]


def test_flipped_bytes_of_a_tar_are_found_and_the_hurt_rows_named(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    name = layout.tar_name(0)
    data = storage.read(name)
    rows = {row.key: row for row in open_writer(storage, plan, 0).rows}
    storage.sweep("own")
    owner = {
        position: row.key
        for row in rows.values()
        for image in (row.real, *row.synthetic)
        for position in range(image.offset, image.offset + image.size)
    }
    headers = range(0, 512, 37)
    padding = [row.real.offset + row.real.size for row in rows.values()]
    positions = {*headers, *padding, len(data) - 1, len(data) - 1025, *random.Random(0).sample(range(len(data)), 60)}
    for position in sorted(positions):
        storage.path.joinpath(name).write_bytes(flip(data, position, position % 8))
        [problem] = verify(storage, plan).problems
        assert (problem.file, problem.shard) == (name, 0)
        assert problem.keys == ((owner[position],) if position in owner else ())
        assert ("only headers, facts or padding" in problem.reason) == (position not in owner)


def test_flipped_bytes_of_part_manifest_and_plan_are_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    for name, shard, step in ((layout.part_name(1), 1, 61), (layout.MANIFEST, None, 31)):
        data = storage.read(name)
        for position in [*range(0, len(data), step), *range(len(data) - 12, len(data))]:
            storage.path.joinpath(name).write_bytes(flip(data, position))
            problems = {problem.file: problem.shard for problem in verify(storage, plan).problems}
            assert problems[name] == shard, position
        storage.path.joinpath(name).write_bytes(data)
    assert found(storage, plan) == {}
    storage.write(layout.PLAN, flip(storage.read(layout.PLAN), 100))
    with pytest.raises(CorruptSetError, match=r"damaged or edited; restore it|not the JSON"):
        read_plan(storage)


@pytest.mark.parametrize("length", [0, 1, 511, 10_000])
def test_truncated_and_grown_tars_are_found(finished: tuple[LocalStorage, Plan], length: int):
    storage, plan = finished
    name = layout.tar_name(0)
    data = storage.read(name)
    storage.write(name, data[:length])
    assert "bytes, not" in found(storage, plan)[name]
    storage.write(name, data + bytes(512))
    assert "only headers, facts or padding" in found(storage, plan)[name]


def test_truncated_parts_and_manifests_are_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    for name in (layout.part_name(0), layout.MANIFEST):
        data = storage.read(name)
        for length in (0, 1, 8, len(data) // 2, len(data) - 1):
            storage.write(name, data[:length])
            assert name in found(storage, plan), length
        storage.write(name, data)


def test_missing_files_are_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    expected = {
        layout.part_name(0): "not committed: its part is missing",
        layout.tar_name(0): "missing",
        layout.MANIFEST: "missing: `pipeline repair` merges it",
    }
    for name, reason in expected.items():
        data = storage.read(name)
        storage.remove(name)
        assert found(storage, plan)[name].startswith(reason)
        storage.write(name, data)
    for name in (layout.part_name(0), layout.tar_name(0)):
        storage.remove(name)
    assert found(storage, plan) == {layout.part_name(0): "missing: not generated yet, or lost"}
    assert verify(storage, plan).bad_shards == [0]


def test_files_of_another_shard_are_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    storage.write(layout.tar_name(1), storage.read(layout.tar_name(0)))
    assert list(found(storage, plan)) == [layout.tar_name(1)]
    storage.write(layout.part_name(1), storage.read(layout.part_name(0)))
    reasons = found(storage, plan)
    assert reasons[layout.part_name(1)] == "holds the rows of shard 0" and layout.MANIFEST in reasons
    assert verify(storage, plan).bad_shards == [1]


def test_strays_are_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    strays = ["pairs-000002.tar", "pairs-000007.parquet", "pairs-1.tar", "pairs-000001 (copy).tar"]
    for name in [*strays, "notes.txt", "other.tar", "train.parquet"]:
        storage.write(name, b"x")
    reasons = found(storage, plan)
    assert sorted(reasons) == sorted(strays) and all("shards 0 to 1; delete" in reason for reason in reasons.values())
    assert verify(storage, plan).bad_shards == []


def test_what_a_dead_process_left_is_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    _leave_temporary(storage.path, "pairs-000000.tar")
    [(name, reason)] = found(storage, plan).items()
    assert name.startswith(".pairs-000000.tar@") and "`pipeline repair` removes it" in reason


def test_keys_in_two_shards_are_found(storage: LocalStorage, plan: Plan):
    claim(storage, plan)
    write_shard(storage, plan, 0)
    writer = open_writer(storage, make_plan(rows=3), 1)  # one row of its own
    sample = make_sample("key_0-1", plan, salt="twice")
    writer.add(sample)
    writer.commit(**FACTS)
    problems = {problem.file: problem.keys for problem in verify(storage, plan).problems}
    assert problems.pop(layout.MANIFEST) == ()
    assert problems == {layout.part_name(0): ("key_0-1",), layout.part_name(1): ("key_0-1",)}


def test_parts_of_another_plan_are_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    cases = {
        "has 3 rows; the plan gives this shard 2": make_plan(rows=6),
        "was made by another generator": make_plan(generator={"class": "other"}),
        "calls 2 rows ok that lack images of the plan, key_1-0 first": make_plan(variations=1),
        "calls 2 rows ok that lack images": make_plan(store_real=None),
    }
    for reason, other in cases.items():
        write_shard(storage, other, 1, replace=True)
        assert reason in found(storage, plan)[layout.part_name(1)]
        assert verify(storage, plan).bad_shards == [1]
    write_shard(storage, plan, 1, replace=True)
    merge(storage, plan)
    assert found(storage, plan) == {}


def test_a_stale_manifest_is_found(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    old = storage.read(layout.MANIFEST)
    write_shard(storage, plan, 0, salt="new", replace=True)
    storage.write(layout.MANIFEST, old)
    assert found(storage, plan) == {
        layout.MANIFEST: "damaged or older than the parts: `pipeline repair` merges it again"
    }


def test_intact_images(tmp_path: Path):
    storage, plan = write_set(str(tmp_path / "set"), failed=["key_0-0"])
    writer = open_writer(storage, plan, 0, failed=["key_0-0"])
    writer.discard()
    failed, row, _ = writer.rows
    sample = make_sample(row.key, plan)
    with storage.open(layout.tar_name(0)) as tar:
        assert is_intact(tar, row) and is_intact(tar, failed) and intact_images(tar, failed) == []
        assert intact_images(tar, row) == [sample.real.data, *(image.data for image in sample.synthetic)]
    storage.write(layout.tar_name(0), flip(storage.read(layout.tar_name(0)), row.synthetic[1].offset))
    with storage.open(layout.tar_name(0)) as tar:
        assert not is_intact(tar, row) and intact_images(tar, row) is None
