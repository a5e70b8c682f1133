"""WebDataset tars as tasks: samples and their labels, several tars, and tars that are damaged."""

from __future__ import annotations

import json

import pytest

from manifests.errors import CorruptSetError, UsageError
from tests.trainer.data.builders import open_pairs, picture
from tests.trainer.data.task_builders import contents, opened, png, samples, sizes, write_tar
from trainer.data.tasks import parse


def test_every_sample_is_found_with_its_class(tmp_path):
    task = opened(write_tar(tmp_path / "set.tar", samples(range(60))))
    found = contents(task)
    assert task.class_names == ("0", "1", "2") and task.train.image_size == (12, 12)
    for number in range(60):
        assert found[f"{number:03d}"] == (str(number % 3), picture(number).tobytes())


def test_names_lie_beside_the_tar(tmp_path):
    tar = write_tar(tmp_path / "set.tar", samples(range(60)))
    (tmp_path / "classes.txt").write_text("cat\ndog\nelk\nyak\n")
    assert opened(tar).class_names == ("cat", "dog", "elk")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")  # of something else
    assert opened(tar).class_names == ("0", "1", "2")


def test_ranges_globs_and_folders_of_tars(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"set-{number:02d}.tar", samples(range(number * 20, number * 20 + 20)))
    (tmp_path / ".hidden.tar").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("words")
    tasks = [opened(f"{tmp_path}/{name}") for name in ("set-{00..03}.tar", "set-*.tar", "set-0{0,1,2,3}.tar", "")]
    assert len({task.fingerprint for task in tasks}) == 1
    assert sum(sizes(tasks[0])) == 80
    assert sum(sizes(opened(f"{tmp_path}/set-{{01..02}}.tar"))) == 40
    with pytest.raises(UsageError, match=r"set-04.tar does not exist"):
        opened(f"{tmp_path}/set-{{00..05}}.tar")


def test_a_folder_of_splits_is_refused(tmp_path):
    for name in ("train-0", "train-1", "test"):
        write_tar(tmp_path / f"{name}.tar", samples(range(20)))
    with pytest.raises(UsageError, match=r"splits test, train; .* --task .*/train\*.tar,test=.*/test.tar") as raised:
        opened(tmp_path)
    said = parse(str(raised.value).partition("--task ")[2])
    assert sum(sizes(opened(said.text))) == 60


def test_equal_keys_in_two_tars_stay_apart(tmp_path):
    write_tar(tmp_path / "a-0.tar", samples(range(30)))
    write_tar(tmp_path / "a-1.tar", samples(range(30), height=13))
    task = opened(f"{tmp_path}/a-*.tar")
    found = contents(task)
    assert len(found) == 60
    assert found["a-1.tar/004"] == ("1", picture(4, height=13, width=12).tobytes())


def test_samples_of_one_name_in_one_tar_stay_apart(tmp_path):
    twice = [*samples(range(30)).items(), ("000.cls", b"2"), ("000.png", png(99))]
    found = contents(opened(write_tar(tmp_path / "set.tar", twice)))
    assert found["000"] == ("0", picture(0).tobytes()) and found["000.2"] == ("2", picture(99).tobytes())


def test_labels_may_be_names_or_in_json(tmp_path):
    members = {}
    for number in range(60):
        name = ("cat", "a dog", "elk")[number % 3]
        members |= {
            f"x/{number}.png": png(number),
            f"x/{number}.json": json.dumps({"label": name, "width": 12}).encode(),
        }
    task = opened(write_tar(tmp_path / "set.tar", members))
    assert task.class_names == ("a dog", "cat", "elk")
    assert contents(task)["x/0"][0] == "cat"
    numbers = {f"{n}.png": png(n) for n in range(60)} | {f"{n}.json": b'{"label": %d}' % (n % 2 + 5) for n in range(60)}
    assert opened(write_tar(tmp_path / "numbers.tar", numbers)).class_names == ("5", "6")
    texts = {f"{n}.png": png(n) for n in range(60)} | {f"{n}.cls": (b" cat\n", b"dog")[n % 2] for n in range(60)}
    assert opened(write_tar(tmp_path / "texts.tar", texts)).class_names == ("cat", "dog")


def test_a_samples_other_files_are_passed_over(tmp_path):
    members = samples(range(40)) | {f"{n:03d}.mask.png": png(200 + n) for n in range(40)} | {"README.md": b"words"}
    members |= {f"{n:03d}.txt": b"a caption" for n in range(40)} | {f"{n:03d}.webp": b"not taken" for n in range(40)}
    task = opened(write_tar(tmp_path / "set.tar", dict(sorted(members.items()))))
    assert task.skipped == ()
    assert contents(task)["007"] == ("1", picture(7).tobytes())
    assert task.notes[0].startswith(
        "40 samples have several images and 80 of these are passed over, as in 000, of which png"
    )


def test_the_tars_of_a_pair_set_give_its_real_images(tmp_path):
    open_pairs(tmp_path / "pairs", 40, variations=2)
    found = contents(opened(f"{tmp_path}/pairs/pairs-*.tar"))
    assert len(found) == 40
    assert found["k7"] == ("1", picture(7, -1).tobytes())


@pytest.mark.parametrize("label", [b"", b"  \n", b"-1", b"99999999999999999999"])
def test_samples_without_a_label_are_named(tmp_path, label):
    members = samples(range(40)) | {"a.png": png(1), "a.cls": label, "b.png": png(2), "c.cls": b"1"}
    task = opened(write_tar(tmp_path / "set.tar", members))
    assert sorted(task.skipped) == ["a: no label", "b: no label", "set.tar/c: no image"]
    assert sum(sizes(task)) == 40


def test_damaged_images_and_texts_are_named(tmp_path):
    members = samples(range(40)) | {"a.jpg": b"words", "a.cls": b"1", "b.png": png(2)[:60], "b.cls": b"0"}
    members |= {"c.png": b"", "c.cls": b"1"}
    task = opened(write_tar(tmp_path / "set.tar", members))
    assert [line.partition(":")[0] for line in task.skipped] == ["a", "b", "c"]


def test_links_are_no_images(tmp_path):
    import tarfile

    path = write_tar(tmp_path / "set.tar", samples(range(40)))
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert [line.partition(": ")[2] for line in opened(path).skipped] == ["a link or a sparse file inside a tar"] * 2


def test_tars_without_labels_or_images_say_what_is_missing(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(9)})
    with pytest.raises(UsageError, match=r"the 9 images of .* have no labels, .* KEY.cls beside KEY.jpg"):
        opened(tar)
    with pytest.raises(UsageError, match=r"no images in the 1 tar\(s\)"):
        opened(write_tar(tmp_path / "b.tar", {"x.txt": b"words"}))


def cut_in_data(data):
    return data[:5000]


def cut_at_a_member(data):
    return data[: 512 * 8]


def damaged_header(data):
    return data[: 512 * 8] + b"\xff" * 512 + data[512 * 9 :]


def two_in_a_row(data):
    return data + data


def words(data):
    return b"these are words" * 200


def nothing(data):
    return b""


@pytest.mark.parametrize("hurt", [cut_in_data, cut_at_a_member, damaged_header, two_in_a_row, words, nothing])
def test_damaged_tars_never_lose_images_in_silence(tmp_path, hurt):
    path = write_tar(tmp_path / "set.tar", samples(range(60)))
    path.write_bytes(hurt(path.read_bytes()))
    with pytest.raises(CorruptSetError, match=r"set.tar is no whole tar: .*fetch it again, or pack it anew"):
        opened(path)


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_compressed_tars_are_refused(tmp_path, magic):
    (tmp_path / "set.tar").write_bytes(magic + b"\0" * 600)
    with pytest.raises(UsageError, match=r"is compressed .* decompress it first"):
        opened(tmp_path / "set.tar")


def test_a_tar_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = write_tar(tmp_path / "set.tar", samples(range(60)))
    task = opened(path)
    path.write_bytes(path.read_bytes()[:2000])
    files = task.train.open_files()
    with pytest.raises(CorruptSetError, match=r"the image at bytes \d+ to \d+ of .*set.tar cannot be read: .*shorter"):
        files.pixels(len(task.train) - 1, -1)
    files.close()


def test_old_and_new_formats_of_tars(tmp_path):
    import io
    import tarfile

    for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"x-{number}.tar", "w", format=kind) as tar:
            for name, data in samples(range(number * 20, number * 20 + 20)).items():
                info = tarfile.TarInfo(f"{'deep/' * 12}{'ü' * 20}{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = contents(opened(f"{tmp_path}/x-*.tar"))
    assert len(found) == 60
    assert found[f"{'deep/' * 12}{'ü' * 20}041"] == ("2", picture(41).tobytes())
