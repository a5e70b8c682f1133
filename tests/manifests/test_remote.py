"""The same contract on fsspec URLs: memory:// and s3:// on a server of this process."""

from __future__ import annotations

import multiprocessing
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from manifests import layout
from manifests.catalog import Catalog, is_manifest_current
from manifests.errors import PlanMismatchError, StorageError
from manifests.plan import Plan, claim, read_plan
from manifests.storage import RemoteStorage, open_storage
from manifests.verify import verify
from tests.manifests.builders import flip, make_plan, write_set, write_shard


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/set"
    return request.getfixturevalue("s3") + "/some/set"


def test_a_set_from_first_to_last(url: str, tmp_path: Path):
    storage, plan = write_set(url, failed=["key_1-0"])
    shards = [name(shard) for shard in range(2) for name in (layout.part_name, layout.tar_name)]
    assert storage.names() == [layout.MANIFEST, *shards, layout.PLAN]
    assert list(tmp_path.iterdir()) == [] and storage.being_written() == set()
    assert verify(storage, plan).problems == []
    catalog = Catalog.open(url + "/")
    assert catalog.plan == plan and len(catalog.permutation(0)) == 4
    row = catalog.row("key_0-1")
    assert catalog.image(row, row.real) == storage.read_range(layout.tar_name(0), row.real.offset, row.real.size)
    write_shard(storage, plan, 0, salt="new", replace=True)
    assert not storage.exists(layout.MANIFEST) and not is_manifest_current(storage, plan)
    data = storage.read(layout.tar_name(0))
    storage.write(layout.tar_name(0), flip(data, 700))
    assert verify(storage, plan).bad_shards == [0]


def test_files_come_and_go(url: str):
    storage = open_storage(url)
    assert isinstance(storage, RemoteStorage) and storage.names() == [] and not storage.exists("a")
    storage.create_folder()
    assert storage.create("a", b"12345") and not storage.create("a", b"2")
    storage.write("b", b"")
    assert storage.names() == ["a", "b"] and storage.read("a") == b"12345" and storage.read("b") == b""
    assert storage.read_range("a", 1, 2) == b"23" and storage.read_range("a", 3, 9) == b"45" and storage.size("a") == 5
    pending = storage.begin("a")
    pending.write(b"x")
    pending.discard()
    assert storage.read("a") == b"12345"
    storage.remove("a")
    storage.remove("a")
    assert storage.names() == ["b"] and open_storage(f"{url}/b").names() == []
    for call in (lambda: storage.read("a"), lambda: storage.size("a"), lambda: storage.open("a")):
        with pytest.raises(StorageError, match=r"cannot read .*/a: it does not exist"):
            call()


def test_claims(url: str):
    storage, plan = open_storage(url), make_plan()
    storage.create_folder()
    assert claim(storage, plan) == plan == claim(storage, plan) == read_plan(storage)
    with pytest.raises(PlanMismatchError, match="seed: 0 in the folder, 1 now"):
        claim(storage, make_plan(seed=1))


def test_what_others_write_is_seen(s3: str):
    storage, client = open_storage(f"{s3}/set"), boto3.client("s3")
    bucket = s3.removeprefix("s3://")

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"set/{name}", Body=data)

    assert storage.names() == [] and not storage.exists("a")
    put("a", b"1")
    assert storage.names() == ["a"] and storage.exists("a") and storage.size("a") == 1
    put("a", b"12345")
    put("b", b"")
    assert storage.size("a") == 5 and storage.read("a") == b"12345" and storage.names() == ["a", "b"]
    put("a", b"1234567")
    with storage.open("a") as file:
        assert file.read() == b"1234567"
    client.delete_object(Bucket=bucket, Key="set/a")
    assert not storage.exists("a") and storage.names() == ["b"]


def _claim(url: str, seed: int, start: Any, results: Any) -> None:
    storage, plan = open_storage(url), make_plan(seed=seed)
    start.wait()
    results.put(storage.create(layout.PLAN, plan.to_bytes()))


def test_exactly_one_of_many_processes_creates_the_plan(s3: str):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_claim, args=(f"{s3}/set", seed, start, results)) for seed in range(3)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [False, False, True]
    for process in processes:
        process.join()
    assert read_plan(open_storage(f"{s3}/set")).seed in range(3)


def test_a_bucket_that_is_not_there_is_not_made(s3: str, plan: Plan):
    storage = open_storage("s3://no-such-bucket-here/set")
    storage.create_folder()
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket-here/set/plan.json"):
        claim(storage, plan)
    names = [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]
    assert "no-such-bucket-here" not in names


def test_errors_of_the_store_are_explained(s3: str, monkeypatch: pytest.MonkeyPatch):
    storage = open_storage(f"{s3}/set")

    class NoCredentialsError(Exception): ...

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    for method in ("exists", "ls", "put_file", "cat_file", "pipe_file", "open", "rm_file"):
        monkeypatch.setattr(storage._fs, method, refuse)
    for call in (
        lambda: storage.exists("a"),
        storage.names,
        lambda: storage.write("a", b"1"),
        lambda: storage.read("a"),
        lambda: storage.create("a", b"1"),
        lambda: storage.open("a"),
        lambda: storage.remove("a"),
    ):
        with pytest.raises(StorageError, match=r"cannot .* s3://.*: Unable to locate credentials"):
            call()
