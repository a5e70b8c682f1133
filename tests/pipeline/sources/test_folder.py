import os
import socket

import pytest

from manifests.errors import UsageError
from pipeline.sources.base import UnreadableImageError, fingerprint
from pipeline.sources.folder import FolderSource
from tests.pipeline.sources.pictures import jpeg


@pytest.fixture
def put(tmp_path):
    """Write a small JPEG, or other bytes, below the test's folder."""

    def write(name, data=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg() if data is None else data)
        return path

    return write


def indexed(folder):
    source = FolderSource(str(folder))
    return source, source.index().to_pylist()


def locations(folder):
    return {row["location"] for row in indexed(folder)[1]}


def classes(folder):
    return {row["location"]: (row["label"], row["class_name"]) for row in indexed(folder)[1]}


def test_class_folders_are_numbered_in_sorted_order(put, tmp_path):
    for name in ("dog/1.jpg", "cat/deep/er/2.PNG", "cat/1.jpg", "empty notes/readme.txt", "Zebra/x.jpeg"):
        put(name)
    assert classes(tmp_path) == {
        "Zebra/x.jpeg": (0, "Zebra"),
        "cat/1.jpg": (1, "cat"),
        "cat/deep/er/2.PNG": (1, "cat"),
        "dog/1.jpg": (2, "dog"),
    }


@pytest.mark.parametrize(
    "names",
    [("1.jpg", "2.jpg"), ("all/1.jpg", "all/2.jpg"), ("train/1.jpg", "val/2.jpg"), ("a/1.jpg", "b/2.jpg", "3.jpg")],
)
def test_folders_that_are_no_classes_give_no_labels(put, tmp_path, names):
    for name in names:
        put(name)
    assert classes(tmp_path) == dict.fromkeys(names, (None, None))


def test_what_is_no_image_is_counted_and_passed_over(put, tmp_path):
    put("1.jpg")
    for name in (
        "notes.txt",
        "noext",
        ".DS_Store",
        "._1.jpg",
        ".cache/2.jpg",
        ".cache/3.jpg",
        "sub/labels.csv",
        "x.heic",
    ):
        put(name)
    source, rows = indexed(tmp_path)
    assert [row["location"] for row in rows] == ["1.jpg"]
    assert source.ignored == 7


def test_every_suffix_in_every_case_and_a_size_for_each(put, tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.Png", "d.webp", "e.gif", "f.bmp", "g.tif", "h.TIFF", "i.ppm", "j.jfif"):
        put(name, b"x" * 7)
    source, rows = indexed(tmp_path)
    assert len(rows) == 10
    assert {row["size"] for row in rows} == {7}
    assert source.ignored == 0


def test_keys_are_unique_stable_and_sorted(put, tmp_path):
    for name in ("a/b.jpg", "a/b.png", "a-b.jpg", "ä.jpg", "a\u0308.jpg", "x y.jpg", "x_y.jpg"):
        put(name)
    source, rows = indexed(tmp_path)
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == 7
    assert keys == sorted(keys)
    assert source.index().equals(FolderSource(str(tmp_path)).index())


def test_a_moved_folder_keeps_keys_and_fingerprint(put, tmp_path):
    put("one/a/1.jpg")
    before = FolderSource(str(tmp_path / "one")).index()
    (tmp_path / "one").rename(tmp_path / "two")
    assert FolderSource(str(tmp_path / "two")).index().equals(before)
    put("two/a/2.jpg")
    assert fingerprint(FolderSource(str(tmp_path / "two")).index()) != fingerprint(before)


def test_names_that_are_not_utf8_are_read_back(tmp_path):
    folder = os.fsencode(tmp_path) + b"/Stra\xdfe\\x"
    os.mkdir(folder)
    with open(folder + b"/caf\xe9\n.jpg", "wb") as file:
        file.write(jpeg())
    source, [row] = indexed(tmp_path)
    assert row["location"] == "Stra\\xdfe\\x5cx/caf\\xe9\n.jpg"
    assert source.read(row["location"], None, row["size"]) == jpeg()


def test_links_to_files_and_folders_are_followed(put, tmp_path):
    put("elsewhere/1.jpg")
    put("root/a/2.jpg")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/3.jpg").symlink_to("../../elsewhere/1.jpg")
    (tmp_path / "link").symlink_to("root")
    source, rows = indexed(tmp_path / "link")
    assert {row["location"] for row in rows} == {"a/2.jpg", "a/3.jpg", "b/1.jpg", "c/1.jpg"}
    assert all(source.read(row["location"], None, None) == jpeg() for row in rows)


def test_links_in_circles_end(put, tmp_path):
    put("a/1.jpg")
    put("b/2.jpg")
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "b/across").symlink_to("../a")
    assert "a/1.jpg" in locations(tmp_path)
    assert "b/across/1.jpg" in locations(tmp_path)
    assert indexed(tmp_path)[0].ignored > 0


def test_images_that_cannot_be_reached_are_rows_with_a_reason(put, tmp_path):
    put("whole.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
    gone = put("gone.jpg")
    source, rows = indexed(tmp_path)
    gone.unlink()
    reasons = {}
    for row in rows:
        try:
            source.read(row["location"], row["offset"], row["size"])
        except UnreadableImageError as error:
            reasons[row["location"]] = str(error)
    assert reasons == {
        "dangling.jpg": "dangling link",
        "circle.jpg": "a link that leads to itself",
        "pipe.jpg": "not a regular file",
        "device.jpg": "not a regular file",
        "socket.jpg": "not a regular file",
        "gone.jpg": "missing file",
    }


def test_a_subfolder_that_cannot_be_listed_is_a_row_with_a_reason(put, tmp_path, monkeypatch):
    put("a/1.jpg")
    put("b/2.jpg")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source, rows = indexed(tmp_path)
    assert {row["location"] for row in rows} == {"a/1.jpg", "b/"}
    with pytest.raises(UnreadableImageError, match="a folder"):
        source.read("b/", None, None)


@pytest.mark.parametrize("location", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_nothing_outside_the_folder_is_read(put, tmp_path, location):
    put("root/a/1.jpg")
    put("secret.jpg")
    with pytest.raises(UnreadableImageError, match="outside"):
        FolderSource(str(tmp_path / "root")).read(location, None, None)


def test_folders_without_images_say_what_was_found(put, tmp_path):
    with pytest.raises(UsageError, match="found nothing there"):
        FolderSource(str(tmp_path / "missing")).index()
    with pytest.raises(UsageError, match="found nothing in 1 folders"):
        FolderSource(str(tmp_path)).index()
    put("a/1.txt")
    put("a/2.txt")
    put("b/1.heic")
    with pytest.raises(UsageError, match=r"found 2 \.txt, 1 \.heic in 3 folders.*jpg, jpeg"):
        FolderSource(str(tmp_path)).index()
    with pytest.raises(UsageError, match="found a file there"):
        FolderSource(str(tmp_path / "a/1.txt")).index()
    with pytest.raises(UsageError, match="local disks only"):
        FolderSource("s3://bucket/folder")
