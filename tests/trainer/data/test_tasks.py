"""Tasks: what is typed, the split by keys, classes of a test part, and errors that say what to do."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import StorageError, UsageError
from tests.trainer.data.builders import open_pairs
from tests.trainer.data.task_builders import contents, opened, png, samples, sizes, write_folder, write_tar
from trainer.data.image_set import ImageSet, Subset
from trainer.data.tasks import BUILT_IN, TaskSpec, open_task, parse


@pytest.mark.parametrize(
    ("text", "location", "test"),
    [
        ("flowers", "flowers", None),
        ("a/train.tar,test=b/test.tar", "a/train.tar", "b/test.tar"),
        ("train-{000..007}.tar", "train-{000..007}.tar", None),
        ("x-{a,b}.tar,test=y-{c,d}.tar", "x-{a,b}.tar", "y-{c,d}.tar"),
        ("torchvision:CIFAR10@/data", "torchvision:CIFAR10@/data", None),
        ("a, b , test=c=d", "a, b , test=c=d", None),
        ("s3://bucket/pairs", "s3://bucket/pairs", None),
    ],
)
def test_what_is_typed(text, location, test):
    assert parse(text) == TaskSpec(text=text, location=location, test=test)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no location; for example --task flowers"),
        (",test=x", "names no location"),
        ("x,test=", "names no test part"),
        ("x,tset=y", "unknown option of a task 'tset'; did you mean 'test'"),
        ("x,test=y,test=z", "more than once"),
    ],
)
def test_what_cannot_be_meant(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_a_split_is_a_hash_of_keys(tmp_path):
    task = opened(write_folder(tmp_path / "animals", 300))
    assert (task.name, task.class_names, task.skipped, task.notes) == ("animals", ("cat", "dog", "elk"), (), ())
    train, validation, test = sizes(task)
    assert train + validation + test == 300
    assert 185 <= train <= 235 and 25 <= validation <= 68 and 25 <= test <= 68
    found = contents(task)
    assert len(found) == 300
    for key, (name, _) in found.items():
        assert key.startswith(f"{name}/")
    # Written down, so that no version may ever put an image into another part.
    assert task.test.keys(np.arange(3)) == ["cat/006.png", "cat/009.png", "cat/012.png"]


def test_parts_stay_when_the_set_grows_or_moves(tmp_path):
    def parts(task):
        sets = {"train": task.train, "validation": task.validation, "test": task.test}
        return {key: name for name, part in sets.items() for key in part.keys(np.arange(len(part)))}

    folder = write_folder(tmp_path / "set", 60)
    task = opened(folder)
    before = parts(task)
    shutil.copytree(folder, tmp_path / "moved")
    assert opened(tmp_path / "moved").fingerprint == task.fingerprint
    write_folder(folder, 90)
    bigger = opened(folder)
    assert before.items() <= parts(bigger).items()
    assert bigger.fingerprint != task.fingerprint


def test_with_a_test_part_the_rest_is_train_and_validation(tmp_path):
    write_folder(tmp_path / "one", 100)
    write_folder(tmp_path / "two", 30)
    alone = opened(tmp_path / "one")
    task = opened(f"{tmp_path}/one,test={tmp_path}/two")
    train, validation, test = sizes(task)
    assert (train + validation, test) == (100, 30)
    assert train == len(alone.train) + len(alone.validation) and validation == len(alone.test)
    assert task.name == "one"
    assert task.test.url == str(tmp_path / "two")


def test_the_classes_of_a_test_part_are_matched_by_name(tmp_path):
    write_folder(tmp_path / "one", 60, ["cat", "dog", "elk"])
    write_folder(tmp_path / "two", 30, ["dog", "elk"])  # numbers 0 and 1 there
    task = opened(f"{tmp_path}/one,test={tmp_path}/two")
    keys, labels = task.test.keys(np.arange(30)), task.test.label
    assert labels is not None
    assert [task.class_names[label] for label in labels] == [key.partition("/")[0] for key in keys]


def test_the_classes_of_a_test_part_are_matched_by_number_without_names(tmp_path):
    write_folder(tmp_path / "one", 60, ["cat", "dog", "elk"])
    tar = write_tar(tmp_path / "two.tar", samples([1, 2, 4]))
    task = opened(f"{tmp_path}/one,test={tar}")
    assert task.test.label is not None and task.test.label.tolist() == [1, 2, 1]


def test_folders_that_are_named_by_numbers_match_numbers(tmp_path):
    write_folder(tmp_path / "one", 120, [str(number) for number in range(12)])  # sorted, 10 and 11 come before 2
    task = opened(f"{tmp_path}/one,test={write_tar(tmp_path / 'two.tar', samples([1, 2, 10], classes=12))}")
    assert task.test.label is not None
    assert [task.class_names[label] for label in task.test.label] == ["1", "2", "10"]


def test_sparse_class_numbers_are_renumbered(tmp_path):
    members = {}
    for number in range(60):
        members |= {f"{number}.png": png(number), f"{number}.cls": str((7, 40, 900)[number % 3]).encode()}
    tar = write_tar(tmp_path / "set.tar", members)
    test = write_tar(tmp_path / "more.tar", {"a.png": png(0), "a.cls": b"900", "b.png": png(1), "b.cls": b"7"})
    task = opened(f"{tar},test={test}")
    assert task.class_names == ("7", "40", "900")
    assert task.train.label is not None and set(task.train.label.tolist()) == {0, 1, 2}
    assert task.test.label is not None and task.test.label.tolist() == [2, 0]


@pytest.mark.parametrize(("other", "lacking"), [("write_folder", "'yak', 'zebra'"), ("write_tar", "'3'")])
def test_classes_that_training_lacks_are_named(tmp_path, other, lacking):
    write_folder(tmp_path / "one", 60)
    if other == "write_folder":
        test = write_folder(tmp_path / "two", 30, ["cat", "yak", "zebra"])
    else:
        test = write_tar(tmp_path / "two.tar", samples(range(8), classes=4))
    with pytest.raises(UsageError, match=f"training has no class {lacking} of the test part; it has"):
        opened(f"{tmp_path}/one,test={test}")


def test_class_names_are_equal_however_their_accents_are_written(tmp_path):
    write_folder(tmp_path / "one", 60, ["caf\u00e9", "dog", "elk"])
    write_folder(tmp_path / "two", 30, ["cafe\u0301", "dog", "elk"])
    task = opened(f"{tmp_path}/one,test={tmp_path}/two")
    assert task.test.label is not None and sorted(set(task.test.label.tolist())) == [0, 1, 2]


def test_classes_without_a_training_image_are_noted(tmp_path):
    folder = write_folder(tmp_path / "set", 60)
    (folder / "yak").mkdir()
    (folder / "yak" / "021.png").write_bytes(png(99))
    names = [f"y/{number}.png" for number in range(200)]
    (folder / "yak" / "021.png").rename(
        folder / "yak" / next(n for n in names if in_test(f"yak{n[1:]}")).partition("/")[2]
    )
    assert opened(folder).notes == ("1 of 4 classes have no training image: 'yak'",)


def in_test(key):
    from trainer.data.tasks import _place

    return _place(key) > 0.85


def test_the_same_place_is_no_test_part(tmp_path):
    folder = write_folder(tmp_path / "set", 60)
    with pytest.raises(UsageError, match="the test part is what is trained on"):
        opened(f"{folder},test={tmp_path}/../{tmp_path.name}/set")


def test_tiny_sets_are_refused_with_their_numbers(tmp_path):
    folder = write_folder(tmp_path / "set", 3)
    with pytest.raises(
        UsageError, match=r"3 labelled images are too few, the \w+ part is empty \(\d train, .*some dozens"
    ):
        opened(folder)


@pytest.mark.parametrize("classes", [["only"], ["only", "empty"]])
def test_one_class_is_refused(tmp_path, classes):
    for name in classes:
        (tmp_path / "set" / name).mkdir(parents=True)
    write_folder(tmp_path / "set", 20, ["only"])
    with pytest.raises(UsageError, match=r"all 20 images of .* are of one class, 'only'"):
        opened(tmp_path / "set")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nowhere", "there is nothing at nowhere; a task is a folder with a folder of images for each class"),
        ("no-{0..3}.tar", "no-0.tar does not exist; check the numbers"),
        ("no-*.tar", "there is nothing at no-"),
        ("~nobody-of-this-name/x", "there is nothing at ~nobody"),
        ("notes.txt", "notes.txt is .txt; a task is"),
        ("set.tar.gz", "set.tar.gz is .gz; a task is"),
    ],
)
def test_places_where_nothing_is(tmp_path, monkeypatch, location, message):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "set.tar.gz"):
        (tmp_path / name).write_text("words")
    with pytest.raises(UsageError, match=message):
        opened(location)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("flowers", "flowers"),
        ("signs/train.tar", "signs"),
        ("signs/train-{0..1}.tar", "signs"),
        ("signs/other-*.tar", "other"),
        ("./flowers/", "flowers"),
        (".", "here"),
        ("pets v2.1", "pets-v2.1"),
    ],
)
def test_names_are_short(tmp_path, monkeypatch, location, name):
    here = tmp_path / "here"
    for folder in ("flowers", "pets v2.1") if location != "." else (".",):
        write_folder(here / folder, 60)
    if "signs" in location:
        (here / "signs").mkdir()
        for stem in ("train", "train-0", "train-1", "other-0", "other-1"):
            write_tar(here / "signs" / f"{stem}.tar", samples(range(30)))
    monkeypatch.chdir(here)
    assert opened(location).name == name


def test_the_labelled_rows_of_a_pair_set(tmp_path):
    rows = open_pairs(tmp_path / "pairs", 60, variations=2, failed=[7])
    task = opened(rows.url)
    assert (task.name, task.class_names) == ("pairs", ("cat", "dog", "a bird"))
    assert sum(sizes(task)) == 59
    assert task.skipped == ("k7: failed when the set was made (unreadable)",)
    assert (task.train.has_real, task.train.has_synthetic, task.train.num_variations) == (True, True, 2)
    assert task.train.image_size == (12, 12) and 0 < task.train.encoded_bytes < rows.encoded_bytes
    found = contents(task)
    files = rows.open_files()
    for index, key in enumerate(rows.keys(np.arange(59))):
        number = int(key[1:])
        assert found[key] == (("cat", "dog", "a bird")[number % 3], files.pixels(index, -1).tobytes())
    files.close()


@pytest.mark.parametrize(("how", "message"), [({"labelled": False}, "no labels"), ({"real": False}, "no real images")])
def test_pair_sets_that_are_no_task(tmp_path, how, message):
    rows = open_pairs(tmp_path / "pairs", 30, **how)
    with pytest.raises(UsageError, match=message):
        opened(rows.url)


def test_a_subset_is_some_of_a_set(tmp_path):
    rows = open_pairs(tmp_path / "pairs", 12, variations=1)
    chosen: ImageSet = Subset(rows, np.array([9, 2, 2]))
    assert (len(chosen), chosen.keys([1, 0]), chosen.image_size) == (3, ["k2", "k9"], (12, 12))
    assert chosen.label is not None and chosen.label.tolist() == [0, 2, 2]
    of_subset, of_rows = chosen.open_files(), rows.open_files()
    for image in (-1, 0):
        assert np.array_equal(of_subset.pixels(0, image), of_rows.pixels(9, image))
    assert "k9" in str(of_subset.damaged(0, -1, "why"))
    of_subset.close()
    of_rows.close()
    others = [Subset(rows, np.array([9, 2])), Subset(rows, np.array([2, 9, 2]))]
    others.append(Subset(rows, np.array([9, 2, 2]), np.array([0, 1, 1], np.int32)))
    assert len({one.fingerprint for one in (chosen, *others)}) == 4


@settings(max_examples=10, deadline=None)
@given(labels=st.lists(st.sampled_from([3, 8, 11]), min_size=80, max_size=120))
def test_labels_name_the_same_class_in_every_part(tmp_path_factory, labels):
    if len(set(labels)) < 2:
        labels = [*labels, 3, 8]
    members = {}
    for number, label in enumerate(labels):
        members |= {f"{number}.png": png(0), f"{number}.cls": str(label).encode()}
    tar = write_tar(tmp_path_factory.mktemp("labels") / "set.tar", members)
    task = opened(tar)
    assert task.class_names == tuple(str(label) for label in sorted(set(labels)))
    for key, (name, _) in contents(task).items():
        assert name == str(labels[int(key)])
    os.unlink(tar)


def test_a_path_that_the_system_refuses(tmp_path):
    with pytest.raises(StorageError, match="cannot read"):
        opened("x" * 5000)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match=r"there is nothing at|does not exist"):
        opened(f"{tmp_path}/loop,test={tmp_path}/other")


def test_the_built_in_task_opens():
    task = open_task(parse(BUILT_IN))
    assert (task.name, sizes(task)) == ("digits-inverted", (1222, 215, 360))
