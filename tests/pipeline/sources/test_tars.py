import io
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from manifests.errors import DiffmixError, UsageError
from pipeline.sources.base import UnreadableImageError
from pipeline.sources.images import decode
from pipeline.sources.tars import TarSource, expand
from tests.pipeline.sources.pictures import LIMIT, encoded, jpeg, noise


def tar_bytes(members, *, format=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return str(path)


def indexed(location):
    source = TarSource(str(location))
    return source, source.index().to_pylist()


def images(location):
    source, rows = indexed(location)
    return {row["key"]: source.read(row["location"], row["offset"], row["size"]) for row in rows}


def test_samples_are_those_of_webdataset(tmp_path):
    path = tmp_path / "train-000.tar"
    pictures = {f"sample{number}": (jpeg(number), number % 3) for number in range(7)}
    with webdataset.TarWriter(str(path)) as writer:
        for key, (picture, label) in pictures.items():
            writer.write({"__key__": key, "jpg": picture, "cls": label, "json": {"a": 1}})
    source, rows = indexed(path)
    assert {row["key"]: row["label"] for row in rows} == {key: label for key, (_, label) in pictures.items()}
    assert images(path) == {key: picture for key, (picture, _) in pictures.items()}
    assert {row["location"] for row in rows} == {"train-000.tar"}
    assert source.ignored == 7  # the json members
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert sorted(theirs) == [row["key"] for row in rows]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_and_long_or_foreign_names(tmp_path, format):
    names = ["./dir.with.dots/a.jpg", "猫.jpg", "x" * 90 + ".jpg", "caf\udce9.jpg", "a b.jpg"]
    path = write_tar(tmp_path / "t.tar", [(name, jpeg(at)) for at, name in enumerate(names)], format=format)
    assert sorted(images(path).values()) == sorted(jpeg(at) for at in range(len(names)))


def test_one_image_of_a_sample_counts_and_the_rest_is_ignored(tmp_path):
    members = [("a.png", b"png"), ("a.jpg", b"jpg"), ("a.seg.png", b"seg"), ("a.cls", b"4\n"), ("a.txt", b"text")]
    members += [("b.left.jpg", b"left"), ("b.right.jpg", b"right"), ("c.txt", b"no image"), ("._a.jpg", b"hidden")]
    members += [("d.JPEG", b"upper"), ("noext", b"")]
    source, rows = indexed(write_tar(tmp_path / "t.tar", members))
    assert images(source.location) == {"a": b"jpg", "b": b"left", "d": b"upper"}
    assert [row["label"] for row in rows] == [4, None, None]
    assert source.ignored == 7


@pytest.mark.parametrize("text", [b"cat", b"", b"-1", b"1.5", b"99999999999", b"\xff\xfe", b"9" * 5000])
def test_a_label_that_is_no_number_is_no_label(tmp_path, text):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", jpeg()), ("a.cls", text), ("b.jpg", jpeg()), ("b.cls", b" 7 ")])
    assert [row["label"] for row in indexed(path)[1]] == [None, 7]


def test_labels_are_found_wherever_they_lie(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("b.cls", b"1"), ("a.jpg", b"A"), ("b.jpg", b"B"), ("a.cls", b"2")])
    assert [(row["key"], row["label"]) for row in indexed(path)[1]] == [("a", 2), ("b", 1)]


def test_names_that_occur_twice_stay_apart(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"xa"), ("b.jpg", b"xb"), ("a.jpg", b"xa2"), ("a.jpg", b"xa3")])
    write_tar(tmp_path / "y.tar", [("a.jpg", b"ya"), ("c.jpg", b"yc")])
    found = images(tmp_path)
    assert sorted(found.values()) == [b"xa", b"xa2", b"xa3", b"xb", b"ya", b"yc"]
    assert found["b"] == b"xb"
    assert found["c"] == b"yc"
    assert sorted(key.rpartition("-")[0] for key in found) == ["", "", "a", "a", "x-a", "y-a"]


def test_members_never_become_paths(tmp_path):
    names = ["../../escape.jpg", "/etc/passwd.jpg", "a/../../b.jpg"]
    path = write_tar(tmp_path / "deep" / "t.tar", [(name, jpeg()) for name in names])
    source, rows = indexed(path)
    assert {row["location"] for row in rows} == {"t.tar"}
    assert sorted(os.listdir(tmp_path)) == ["deep"]
    with pytest.raises(UnreadableImageError, match="outside"):
        source.read("../t.tar", 0, 1)


def test_links_and_empty_members_are_rows_with_a_reason(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("folder.jpg", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "empty.jpg"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("empty.jpg"), io.BytesIO())
    source, rows = indexed(path)
    assert [row["key"] for row in rows] == ["empty", "hard", "link"]
    assert source.read(rows[0]["location"], rows[0]["offset"], rows[0]["size"]) == b""
    for row in rows[1:]:
        with pytest.raises(UnreadableImageError, match="link"):
            source.read(row["location"], row["offset"], row["size"])


def test_a_tar_that_shrank_or_went_away_gives_reasons(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", jpeg())])
    source, [row] = indexed(path)
    os.truncate(path, row["offset"] + 10)
    with pytest.raises(UnreadableImageError, match="shorter"):
        source.read(row["location"], row["offset"], row["size"])
    os.unlink(path)
    with pytest.raises(UnreadableImageError, match="missing file"):
        source.read(row["location"], row["offset"], row["size"])


def test_patterns(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"train-{number:03d}.tar", [(f"k{number}.jpg", jpeg())])
    write_tar(tmp_path / "val.tar", [("v.jpg", jpeg())])
    expected = {"k8", "k9", "k10"}
    assert set(images(tmp_path / "train-{008..010}.tar")) == expected
    assert set(images(tmp_path / "train-*.tar")) == expected
    assert set(images(tmp_path / "{train-008,val}.tar")) == {"k8", "v"}
    assert set(images(tmp_path)) == expected | {"v"}
    assert set(images(f"{tmp_path}/")) == expected | {"v"}
    assert expand(str(tmp_path / "train-0{08..10}.tar")) == expand(str(tmp_path / "train-*.tar"))
    one = {row["location"] for row in indexed(tmp_path / "train-{008..010}.tar")[1]}
    assert one == {row["location"] for row in indexed(tmp_path / "train-*.tar")[1]}


@pytest.mark.parametrize("name", ["none.tar", "none-*.tar", "none-{0..1}.tar", "."])
def test_tars_that_are_not_there(tmp_path, name):
    with pytest.raises(UsageError, match=r"does not exist|no tar at"):
        TarSource(str(tmp_path / name)).index()


def test_too_wide_a_range_is_refused(tmp_path):
    for pattern in ("{0..999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(UsageError, match="stands for"):
            TarSource(str(tmp_path / pattern)).index()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "t.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UsageError, match=r"t\.tar is compressed with .*Decompress"):
        TarSource(str(tmp_path / "t.tar")).index()


def test_damaged_tars_are_named_with_the_place(tmp_path):
    whole = tar_bytes([(f"{name}.jpg", jpeg(seed)) for seed, name in enumerate("abc")])
    second = whole.index(b"b.jpg")
    flipped = bytearray(whole)
    flipped[second] ^= 1
    negative = bytearray(whole)
    negative[second + 124 : second + 136] = b"\xff" * 12
    cases = [b"", b"no tar at all" * 99, whole[: second + 700], whole[:second], flipped, negative]
    cases += [whole[: len(whole) - 512], whole + whole, whole[: second + 100]]
    path = tmp_path / "t.tar"
    for data in cases[:6] + cases[7:]:
        path.write_bytes(bytes(data))
        with pytest.raises(UsageError, match=r"t\.tar is no whole tar: .*after byte \d+"):
            TarSource(str(path)).index()
    path.write_bytes(cases[6])
    assert len(indexed(path)[1]) == 3


def test_tars_without_images_say_so(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.txt", b"x"), ("a.json", b"{}")])
    with pytest.raises(UsageError, match=r"no image in the 1 tar\(s\).*2 other members"):
        TarSource(path).index()


def test_tars_at_a_url(tmp_path):
    store = fsspec.filesystem("memory")
    for number in range(2):
        store.pipe(
            f"/tars-of-a-test/t-{number}.tar", tar_bytes([(f"k{number}.jpg", jpeg(number)), (f"k{number}.cls", b"3")])
        )
    try:
        for location in ("t-{0..1}.tar", "t-*.tar", ""):
            assert images(f"memory://tars-of-a-test/{location}") == {"k0": jpeg(0), "k1": jpeg(1)}
        assert images("memory://tars-of-a-test/t-1.tar") == {"k1": jpeg(1)}
        with pytest.raises(DiffmixError, match="does not exist"):
            TarSource("memory://tars-of-a-test/t-9.tar").index()
    finally:
        store.rm("/tars-of-a-test", recursive=True)


def test_a_source_goes_to_another_process(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.png", encoded(noise(), "PNG"))])
    source, [row] = indexed(path)
    copy = pickle.loads(pickle.dumps(source))
    rgb = decode(copy.read(row["location"], row["offset"], row["size"]), max_pixels=LIMIT)
    assert np.array_equal(rgb, noise())


@pytest.mark.skipif("DIFFMIX_DATA" not in os.environ, reason="DIFFMIX_DATA names no folder of real tars")
def test_real_tars():
    for path in sorted(Path(os.environ["DIFFMIX_DATA"]).rglob("*.tar")):
        source, rows = indexed(path)
        assert rows
        for row in rows[:300]:
            assert decode(source.read(row["location"], row["offset"], row["size"]), max_pixels=LIMIT).ndim == 3
