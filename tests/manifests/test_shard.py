from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import layout
from manifests.catalog import Catalog, read_part
from manifests.errors import StorageError
from manifests.plan import Plan
from manifests.schema import FAILED, OK, facts_of, table_to_rows
from manifests.shard import EncodedImage, EncodedVariation, Sample, ShardWriter
from manifests.storage import LocalStorage, open_storage
from manifests.verify import verify
from tests.manifests.builders import FACTS, make_plan, make_sample, open_writer, write_set, write_shard
from tests.manifests.test_storage import file_size_limit


def members(storage: LocalStorage, shard: int) -> dict[str, bytes]:
    with tarfile.open(storage.path / layout.tar_name(shard)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_tar_is_one_that_tarfile_reads(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    names = list(members(storage, 0))
    keys = ["key_0-0", "key_0-1", "key_0-2"]
    suffixes = ["real.jpg", "syn0.jpg", "syn1.jpg", "json", "cls"]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in suffixes]
    assert [name.partition(".")[0] for name in members(storage, 1)] == ["key_1-1"] * 5  # a failed row has none
    with tarfile.open(storage.path / layout.tar_name(0)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.isreg() and member.mode == 0o644


def test_the_tar_is_one_that_webdataset_reads(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    urls = [str(storage.path / layout.tar_name(shard)) for shard in range(2)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == ["key_0-0", "key_0-1", "key_0-2", "key_1-1"]
    rows = {row.key: row for shard in range(2) for row in table_to_rows(read_part(storage, shard))}
    for sample in samples:
        row = rows[sample["__key__"]]
        assert hashlib.sha256(sample["real.jpg"]).digest() == row.real.sha256
        assert hashlib.sha256(sample["syn1.jpg"]).digest() == row.synthetic[1].sha256
        assert int(sample["cls"]) == row.label


def test_rows_point_at_the_bytes(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    catalog = Catalog.open(storage.url)
    for row in catalog.rows(range(len(catalog))):
        if row.status == FAILED:
            assert (row.error, row.real, row.synthetic) == ("unreadable", None, ())
            continue
        sample = make_sample(row.key, plan)
        tar = members(storage, row.shard)
        assert catalog.image(row, row.real) == sample.real.data == tar[layout.real_member(row.key)]
        for index, image in enumerate(row.synthetic):
            assert (
                catalog.image(row, image)
                == sample.synthetic[index].data
                == tar[layout.synthetic_member(row.key, index)]
            )
            assert hashlib.sha256(sample.synthetic[index].data).digest() == image.sha256
            assert (image.seed, image.similarity) == (sample.synthetic[index].seed, 0.5 + index / 8)
        assert (row.source, row.class_name, row.generator) == (sample.source, sample.class_name, plan.generator_id)


def test_the_part_holds_the_facts_of_its_tar(finished: tuple[LocalStorage, Plan]):
    storage, _ = finished
    facts = facts_of(read_part(storage, 0).schema, "part")
    data = storage.read(layout.tar_name(0))
    assert (facts.shard, facts.tar_size, facts.tar_sha256) == (0, len(data), hashlib.sha256(data).hexdigest())
    assert (facts.batch_size, facts.seconds, facts.device, facts.versions) == (4, 1.5, "cpu", {"torch": "2"})
    assert len(data) % tarfile.RECORDSIZE == 0 and data.endswith(bytes(1024))


def test_json_members_have_one_shape_and_no_nulls(tmp_path: Path):
    shapes = set()
    for labelled in (True, False):
        plan = make_plan(labelled=labelled, rows=4, shards=1)
        storage = open_storage(str(tmp_path / str(labelled)))
        storage.create_folder()
        write_shard(storage, plan, 0)
        contents = members(storage, 0)
        facts = [json.loads(data) for name, data in contents.items() if name.endswith(".json")]
        shape = {tuple((name, type(value).__name__) for name, value in fact.items()) for fact in facts}
        assert len(facts) == 4 and len(shape) == 1 and None not in facts[0].values()
        assert sum(name.endswith(".cls") for name in contents) == (4 if labelled else 0)
        shapes |= shape
    assert len(shapes) == 1 and facts[0]["label"] == -1 and facts[0]["class_name"] == ""


def test_scores_are_left_out_of_sets_without_them(storage: LocalStorage):
    writer = ShardWriter(storage, 0, generator=None, labelled=False)
    image = EncodedVariation(data=b"x", width=1, height=1, seed=2)
    writer.add(Sample(key="a", synthetic=[image]))
    writer.commit()
    assert json.loads(members(storage, 0)["a.json"]) == {
        "key": "a", "label": -1, "class_name": "", "source": "", "generator": "", "seeds": [2]
    }  # fmt: skip


@given(
    st.lists(st.tuples(st.from_regex(r"\A[A-Za-z0-9_-]{1,80}\Z"), st.binary(max_size=1100)), unique_by=lambda x: x[0])
)
@settings(max_examples=30)
def test_equal_members_give_equal_bytes_and_right_offsets(contents: list[tuple[str, bytes]]):
    tars = []
    for copy in range(2):
        storage = open_storage(f"memory://equal-{copy}")
        writer = ShardWriter(storage, 0, generator=None, labelled=False)
        for key, data in contents:
            writer.add(Sample(key=key, real=EncodedImage(data=data, width=1, height=1)))
        assert writer.commit(replace=True)
        tars.append(storage.read(layout.tar_name(0)))
    assert tars[0] == tars[1]
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as tar:
        found = [(member.name, member.offset_data, member.size) for member in tar if member.name.endswith(".jpg")]
    assert found == [(f"{row.key}.real.jpg", row.real.offset, row.real.size) for row in writer.rows]
    for row, (_, data) in zip(writer.rows, contents, strict=True):
        assert tars[0][row.real.offset :][: row.real.size] == data


def test_bad_samples_are_refused(storage: LocalStorage):
    writer = ShardWriter(storage, 0, generator=None, labelled=True)
    for key in ("a.b", "", "a/b", "é", "a\n"):
        with pytest.raises(ValueError, match="is no key"):
            writer.add(Sample(key=key, label=1))
    with pytest.raises(ValueError, match="a has no label"):
        writer.add(Sample(key="a"))
    writer.discard()
    assert storage.names() == []


def test_only_the_part_commits(storage: LocalStorage, plan: Plan):
    writer = open_writer(storage, plan, 0)
    assert storage.being_written() == {layout.tar_name(0)}
    assert not storage.exists(layout.tar_name(0)) and not storage.exists(layout.part_name(0))
    writer.discard()
    assert storage.names() == []
    assert write_shard(storage, plan, 0)
    assert storage.names() == [layout.part_name(0), layout.tar_name(0)]


def test_a_committed_shard_stays(storage: LocalStorage, plan: Plan):
    write_shard(storage, plan, 0)
    before = [storage.read(name) for name in storage.names()]
    assert write_shard(storage, plan, 0, salt="other")
    assert [storage.read(name) for name in storage.names()] == before and len(before) == 2


def test_a_shard_committed_during_the_last_fsync_stays(
    storage: LocalStorage, plan: Plan, monkeypatch: pytest.MonkeyPatch
):
    late = open_writer(storage, plan, 0, salt="late")
    finish = late._tar.finish
    monkeypatch.setattr(late._tar, "finish", lambda: (finish(), write_shard(storage, plan, 0)))
    assert late.commit(**FACTS)
    assert storage.read_range(layout.tar_name(0), 512, 4) == make_sample("key_0-0", plan).real.data[:4]
    assert storage.names() == [layout.part_name(0), layout.tar_name(0)]


def test_replacing_removes_manifest_and_part_first(
    finished: tuple[LocalStorage, Plan], monkeypatch: pytest.MonkeyPatch
):
    storage, plan = finished
    writer = open_writer(storage, plan, 0, salt="other")
    seen = []
    commit = writer._tar.pending.commit
    monkeypatch.setattr(writer._tar.pending, "commit", lambda: (seen.extend(storage.names()), commit()))
    assert writer.commit(replace=True, **FACTS)
    visible = [name for name in seen if not name.startswith(".")]
    assert visible == [layout.tar_name(0), layout.part_name(1), layout.tar_name(1), layout.PLAN]
    assert [problem.file for problem in verify(storage, plan).problems] == [layout.MANIFEST]
    with pytest.warns(UserWarning, match=r"has no manifest.parquet yet: reading 2 of its 2 shards"):
        assert Catalog.open(storage.url).row("key_0-1").status == OK


@pytest.mark.parametrize("limit", [300, 9_000])
def test_a_full_disk_leaves_nothing_visible(storage: LocalStorage, plan: Plan, limit: int):
    with file_size_limit(limit):
        writer = None
        with pytest.raises(StorageError, match="no space left"):
            writer = open_writer(storage, plan, 0)
            writer.commit(**FACTS)
        if writer is not None:
            writer.discard()
    assert storage.names() == []


def test_an_unwritable_part_leaves_the_shard_uncommitted(
    storage: LocalStorage, plan: Plan, monkeypatch: pytest.MonkeyPatch
):
    writer = open_writer(storage, plan, 0)
    (storage.path / layout.part_name(0)).mkdir()
    monkeypatch.setattr(storage, "exists", lambda name: False)
    with pytest.raises(StorageError, match=r"cannot write .*pairs-000000.parquet"):
        writer.commit(**FACTS)
    assert storage.names() == [layout.part_name(0), layout.tar_name(0)]  # the folder, and a tar that does not count
    (storage.path / layout.part_name(0)).rmdir()
    assert write_shard(storage, plan, 0)


def test_commit_where_files_have_no_identity(storage: LocalStorage, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.path.samestat", lambda one, other: False)
    assert write_shard(storage, plan, 0)
    assert storage.names() == [layout.part_name(0), layout.tar_name(0)]


def test_sets_without_a_side(tmp_path: Path):
    for name, plan in {
        "real": make_plan(generator=None, variations=0),
        "synthetic": make_plan(store_real=None, source={"kind": "noise"}),
    }.items():
        storage, _ = write_set(str(tmp_path / name), plan)
        assert not verify(storage, plan).problems
        [row] = Catalog.open(storage.url).rows([3])
        assert (row.real is None) == (name == "synthetic") and len(row.synthetic) == plan.variations
