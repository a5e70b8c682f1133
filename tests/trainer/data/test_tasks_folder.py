"""Folders as tasks: classes, links, hidden and strange files, and damage of every kind."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from manifests.errors import CorruptSetError, UsageError
from tests.trainer.data.builders import picture
from tests.trainer.data.task_builders import (
    contents,
    file_bytes,
    jpeg,
    opened,
    png,
    samples,
    sizes,
    write_folder,
    write_tar,
)
from trainer.data.labelled import check
from trainer.data.tasks import open_task, parse


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "animals", 60)


def test_every_picture_is_found_with_its_class(folder):
    found = contents(opened(folder))
    for number in range(60):
        name = ("cat", "dog", "elk")[number % 3]
        assert found[f"{name}/{number:03d}.png"] == (name, picture(number).tobytes())


def test_nested_folders_links_and_upper_case_count(folder, tmp_path):
    (folder / "cat" / "more" / "deep").mkdir(parents=True)
    (folder / "cat" / "more" / "deep" / "A.PNG").write_bytes(png(100))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpeg").write_bytes(jpeg(101))
    (folder / "yak").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "link.png").symlink_to(folder / "cat" / "000.png")
    (folder / "dog" / "loop").symlink_to(folder)
    (folder / "dog" / "again").symlink_to(folder / "dog")
    task = opened(folder)
    found = contents(task)
    assert task.class_names == ("cat", "dog", "elk", "yak")
    assert found["cat/more/deep/A.PNG"][0] == "cat" and found["yak/b.jpeg"][0] == "yak"
    assert found["dog/link.png"] == ("dog", picture(0).tobytes())


def test_archives_beside_class_folders_are_noted(folder):
    write_tar(folder / "animals.tar", samples(range(9)))
    task = opened(folder)
    assert (task.class_names, sum(sizes(task))) == (("cat", "dog", "elk"), 60)
    assert "animals.tar beside them passed over" in task.notes[0]


def test_what_is_hidden_or_no_image_is_passed_over(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(png(0))
    (folder / "cat" / "._000.png").write_bytes(b"mac")
    (folder / "cat" / "Thumbs.db").write_bytes(b"windows")
    (folder / "labels.csv").write_text("a,b")
    task = opened(folder)
    assert (sum(sizes(task)), task.skipped) == (60, ())


def test_damaged_and_renamed_files_are_named_and_the_rest_trains(folder):
    whole = jpeg(1, 200, 200)
    (folder / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "text.jpg").write_text("this is a text\n")
    (folder / "dog" / "empty.png").write_bytes(b"")
    middle = bytearray(png(5, 60, 60))
    middle[200:260] = b"\0" * 60
    (folder / "elk" / "middle.png").write_bytes(middle)
    (folder / "elk" / "dangling.png").symlink_to(folder / "nothing.png")
    os.mkfifo(folder / "elk" / "pipe.png")
    (folder / "stray.jpg").write_bytes(jpeg(2))
    (folder / "zoo").mkdir()
    task = opened(folder)
    assert sum(sizes(task)) == 60 and task.class_names == ("cat", "dog", "elk")
    reasons = dict(line.split(": ", 1) for line in task.skipped)
    assert set(reasons) == {
        *("cat/cut.jpg", "dog/text.jpg", "dog/empty.png", "elk/middle.png", "elk/dangling.png", "elk/pipe.png"),
        *("stray.jpg", "zoo/"),
    }
    assert "cut off" in reasons["cat/cut.jpg"]
    assert "not an image" in reasons["dog/text.jpg"]
    assert reasons["dog/empty.png"] == "the file is empty"
    assert "damaged" in reasons["elk/middle.png"]
    assert reasons["elk/pipe.png"] == "not a regular file"
    assert reasons["stray.jpg"] == "no label, it lies beside the class folders"
    contents(task)


def test_large_sets_are_checked_by_header_and_end(folder, monkeypatch):
    """And what only decoding finds stops the stream, with the file's name."""
    monkeypatch.setattr(check, "DECODE_WORK", 0)
    whole = jpeg(1, 200, 200)
    (folder / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "text.jpg").write_text("this is a text\n")
    (folder / "elk" / "fine.jpg").write_bytes(jpeg(1, 200, 200) + b"\0" * 9)
    middle = bytearray(png(5, 60, 60))
    middle[200:260] = b"\0" * 60
    (folder / "elk" / "middle.png").write_bytes(middle)
    task = opened(folder)
    assert [line.partition(":")[0] for line in task.skipped] == ["cat/cut.jpg", "dog/text.jpg"]
    with pytest.raises(CorruptSetError, match=r"elk/middle.png cannot be read: .*damaged.*take it out of the set"):
        contents(task)


def test_a_header_may_be_long_and_a_file_vanish(folder, monkeypatch):
    monkeypatch.setattr(check, "DECODE_WORK", 0)
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    exif[0x0112] = 6
    long = file_bytes(Image.fromarray(picture(3, height=30, width=20)), "JPEG", exif=exif, quality=100)
    assert len(long) > 1 << 15
    (folder / "cat" / "long.jpg").write_bytes(long)
    task = opened(folder)
    assert task.skipped == ()
    by_key = {key: (part, at) for part in (task.train, task.validation, task.test)
              for at, key in enumerate(part.keys(np.arange(len(part))))}  # fmt: skip
    part, at = by_key["cat/long.jpg"]
    files = part.open_files()
    assert files.pixels(at, -1).shape == (20, 30, 3)
    (folder / "cat" / "long.jpg").unlink()
    with pytest.raises(CorruptSetError, match=r"cat/long.jpg cannot be read: No such file or directory"):
        files.pixels(at, -1)


def test_images_of_one_size_are_known_to_be(folder):
    assert opened(folder).train.image_size == (12, 12)
    (folder / "cat" / "other.png").write_bytes(png(3, 12, 13))
    assert opened(folder).train.image_size is None


def test_damaged_images_do_not_hide_that_the_others_are_of_one_size(folder):
    (folder / "cat" / "text.png").write_text("words")
    assert opened(folder).train.image_size == (12, 12)


def test_the_limit_of_pixels_names_the_image(folder):
    (folder / "cat" / "huge.png").write_bytes(png(3, 40, 40))
    task = open_task(parse(str(folder)), max_pixels=1000)
    assert task.skipped == ("cat/huge.png: 40 x 40 pixels are more than the 1000 that are allowed",)


def test_names_that_are_no_utf8_can_be_printed(folder):
    (folder / os.fsdecode(b"b\xe9te")).mkdir()
    for number in range(9):
        (folder / os.fsdecode(b"b\xe9te") / os.fsdecode(b"\xff%d.png" % number)).write_bytes(png(number))
    (folder / "cat" / os.fsdecode(b"\xfe.png")).write_text("words")
    task = opened(folder)
    assert task.class_names[0] == "b\\udce9te"
    assert sum(name == "b\\udce9te" for name, _ in contents(task).values()) == 9
    for line in task.skipped:
        line.encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds nothing"),
        (["a.txt", "b/c.txt"], "its 1 folders hold no images"),
        (["a.txt"], "it holds a.txt"),
        (["1.jpg", "2.jpg"], "has 2 images and no class folders, so that they have no labels; put the images of each"),
        (
            ["train/cat/1.jpg", "test/cat/2.jpg"],
            r"the splits test, train; say which is which, as --task .*/train,test=.*/test",
        ),
        (["train/cat/1.jpg", "val/cat/2.jpg"], r"as --task .*/train,test=.*/val"),
    ],
)
def test_folders_that_are_no_task(tmp_path, files, message):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(1))
    with pytest.raises(UsageError, match=message):
        opened(folder)


def test_a_set_of_nothing_but_damage_says_so(tmp_path):
    for number in range(4):
        (tmp_path / "set" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[number % 2] / f"{number}.jpg").write_text("words")
    with pytest.raises(UsageError, match=r"none of the 4 images of .* can be read: a/0.jpg: not an image"):
        opened(tmp_path / "set")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_named(folder):
    (folder / "cat" / "000.png").chmod(0)
    (folder / "dog").chmod(0)
    try:
        task = opened(folder)
    finally:
        (folder / "dog").chmod(0o755)
    assert [line.partition(":")[0] for line in task.skipped] == ["dog", "dog/", "cat/000.png"]
