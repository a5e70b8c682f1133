from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import layout
from manifests import storage as storage_module
from manifests.errors import CorruptSetError, DiffmixError, PlanMismatchError, SchemaVersionError, StorageError
from manifests.plan import Plan, claim, differences, read_plan
from manifests.storage import LocalStorage, open_storage
from tests.manifests.builders import flip, make_plan


@given(rows=st.integers(1, 10**7), shards=st.integers(1, 10**4))
def test_shards_share_the_rows_evenly(rows: int, shards: int):
    plan = make_plan(rows=rows, shards=shards)
    sizes = [plan.shard_rows(shard) for shard in range(shards)]
    assert sum(sizes) == rows and max(sizes) - min(sizes) <= 1 and plan.largest_shard == max(sizes)


def test_plans_come_back():
    for plan in (
        make_plan(),
        make_plan(generator=None, limit=3, store_real=None, source={"kind": "é", "x": [1, None]}),
    ):
        assert Plan.from_bytes(plan.to_bytes()) == plan
        assert plan.to_bytes() == plan.to_bytes() and plan.to_bytes().endswith(b"}\n")


def test_every_flipped_bit_is_refused():
    data = make_plan().to_bytes()
    for position in range(len(data)):
        for bit in range(8):
            with pytest.raises((CorruptSetError, SchemaVersionError)):
                Plan.from_bytes(flip(data, position, bit))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"1", b"{", b'{"schema_version": 1}', b"\xff\xfe"])
def test_other_content_is_refused(data: bytes):
    with pytest.raises((CorruptSetError, SchemaVersionError), match=r"plan\.json"):
        Plan.from_bytes(data)


@pytest.mark.parametrize(("version", "advice"), [(99, "newer diffmix"), (0, "generate it again"), ("1", "no schema")])
def test_other_schema_versions_are_refused_with_what_to_do(storage: LocalStorage, version: object, advice: str):
    values = json.loads(make_plan().to_bytes()) | {"schema_version": version, "new_field": 1}
    storage.write(layout.PLAN, json.dumps(values).encode())
    for call in (lambda: read_plan(storage), lambda: claim(storage, make_plan())):
        with pytest.raises(SchemaVersionError, match=advice):
            call()


def test_the_same_plan_joins(storage: LocalStorage, plan: Plan):
    assert claim(storage, plan) == plan
    assert claim(storage, plan) == plan == read_plan(storage)
    assert storage.names() == [layout.PLAN]


def test_moved_places_join_and_the_first_stay_recorded(storage: LocalStorage):
    first = claim(storage, make_plan(source={"kind": "pack", "location": "/a", "synthetic": "/b", "fingerprint": "f"}))
    moved = replace(
        first, source=first.source | {"location": "/c", "synthetic": "/d"}, generator=first.generator | {"model": "/m"}
    )
    assert claim(storage, moved) == first
    assert moved.generator_id == first.generator_id


def test_tuples_and_lists_are_the_same_plan(storage: LocalStorage):
    claim(storage, make_plan(generator={"size": (64, 64), "nested": {"betas": (0.1, 0.2)}}))
    claim(storage, make_plan(generator={"size": [64, 64], "nested": {"betas": (0.1, 0.2)}}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, ["seed: 0 in the folder, 7 now"]),
        ({"generator": {"class": "sd", "model": "/b", "revision": "r2"}}, ["generator.revision", "generator.steps"]),
        ({"source": {"kind": "folder", "fingerprint": "g"}}, ["source.fingerprint"]),
        ({"shards": 3, "rows": 4}, ["shards: 2", "rows: 5"]),
        ({"generator": None}, ["generator.class"]),
    ],
)  # fmt: skip
def test_another_plan_is_refused_and_named(
    storage: LocalStorage, plan: Plan, changes: dict[str, Any], named: list[str]
):
    claim(storage, plan)
    with pytest.raises(PlanMismatchError) as caught:
        claim(storage, make_plan(**changes))
    message = str(caught.value)
    assert all(name in message for name in named) and "--overwrite" in message and "location" not in message
    assert read_plan(storage) == plan


def test_nested_differences_are_named_to_the_leaf():
    one, other = (make_plan(generator={"config": {"a": 1, "b": {"c": value}}}) for value in (1, 2))
    assert differences(one, other) == [("generator.config.b.c", 1, 2)]
    assert one.generator_id != other.generator_id


def test_absent_and_damaged_plans(storage: LocalStorage, plan: Plan):
    with pytest.raises(StorageError, match="is no pair set"):
        read_plan(storage)
    storage.write(layout.PLAN, flip(plan.to_bytes(), 50))
    with pytest.raises(CorruptSetError):
        claim(storage, plan)


def test_a_plan_that_appears_slowly_is_waited_for(storage: LocalStorage, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    storage.write(layout.PLAN, b"")
    monkeypatch.setattr("time.sleep", lambda seconds: storage.write(layout.PLAN, plan.to_bytes()))
    assert claim(storage, plan) == plan


def _claim(url: str, seed: int, linkless: bool, start: Any, results: Any) -> None:
    storage = open_storage(url)
    created = []
    create = storage.create
    storage.create = lambda *args: created.append(create(*args)) or created[-1]  # type: ignore[method-assign]
    if linkless:
        storage_module.os.link = _no_link
    start.wait()
    try:
        answer: object = claim(storage, make_plan(seed=seed)).seed
    except DiffmixError as error:
        answer = type(error).__name__
    results.put((answer, True in created))


def _no_link(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("linkless", [False, True])
def test_exactly_one_of_many_processes_creates_the_plan(storage: LocalStorage, linkless: bool):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    for _ in range(5):
        start = context.Barrier(8)
        processes = [
            context.Process(target=_claim, args=(storage.url, number % 2, linkless, start, results))
            for number in range(8)
        ]
        for process in processes:
            process.start()
        answers = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sum(created for _, created in answers) == 1
        winner = read_plan(storage).seed
        assert sorted(map(str, (answer for answer, _ in answers))) == sorted(
            [str(winner)] * 4 + ["PlanMismatchError"] * 4
        )
        assert storage.names() == [layout.PLAN]
        storage.remove(layout.PLAN)
