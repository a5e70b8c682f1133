"""Datasets of torchvision as tasks, written to disk here in their own formats: nothing is fetched."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from manifests.errors import CorruptSetError, UsageError
from tests.trainer.data.builders import picture
from tests.trainer.data.task_builders import contents, jpeg, opened, sizes
from trainer.data.labelled import check


def write_mnist(root, name="MNIST"):
    """60 training images of 28 px and 20 test images, of classes 0 to 2."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = np.stack([picture(number, height=28, width=28)[..., 0] for number in range(count)])
        labels = bytes(number % 3 for number in range(count))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)
    return root


def write_folders(root, splits, classes=("cat", "dog")):
    for split in splits:
        for number in range(40):
            path = root / split / classes[number % len(classes)] / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number, height=20, width=30 + number % 2))
    return root


@pytest.mark.parametrize("name", ["MNIST", "KMNIST", "FashionMNIST"])
def test_a_dataset_in_memory(tmp_path, name):
    write_mnist(tmp_path, name)
    task = opened(f"torchvision:{name}@{tmp_path}")
    train, validation, test = sizes(task)
    assert (train + validation, test) == (60, 20) and task.train.image_size == (28, 28)
    assert task.name == name.lower() and len(task.class_names) == 3
    found = contents(task)
    for number in range(60):
        grey = picture(number, height=28, width=28)[..., :1]
        class_name, pixels = found[f"train-{number:07d}"]
        assert class_name == task.class_names[number % 3]
        assert pixels == np.repeat(grey, 3, axis=2).tobytes()
    assert task.fingerprint == opened(f"torchvision:{name}@{tmp_path}").fingerprint


def test_the_default_root_is_data(tmp_path, monkeypatch):
    write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    task = opened("torchvision:MNIST")
    assert task.class_names == ("0 - zero", "1 - one", "2 - two")


def test_a_dataset_of_files_with_splits(tmp_path):
    write_folders(tmp_path / "country211", ["train", "valid", "test"])
    task = opened(f"torchvision:Country211@{tmp_path}")
    assert task.class_names == ("cat", "dog") and len(task.test) == 40
    assert task.train.image_size is None and len(contents(task)) == 80


def test_a_dataset_without_splits_is_split_by_keys(tmp_path):
    write_folders(tmp_path / "eurosat", ["2750"])
    assert sum(sizes(opened(f"torchvision:EuroSAT@{tmp_path}"))) == 40
    write_folders(tmp_path / "more", ["test"])
    task = opened(f"torchvision:EuroSAT@{tmp_path},test={tmp_path}/more/test")
    assert len(task.test) == 40 and task.test.url.endswith("more/test")


def test_the_test_part_of_a_dataset_may_test_another_set(tmp_path):
    write_mnist(tmp_path / "one")
    write_mnist(tmp_path / "two", "KMNIST")
    with pytest.raises(UsageError, match="training has no class 'o'"):
        opened(f"torchvision:MNIST@{tmp_path}/one,test=torchvision:KMNIST@{tmp_path}/two")
    task = opened(f"torchvision:MNIST@{tmp_path}/one,test=torchvision:MNIST@{tmp_path}/one")
    assert len(task.test) == 20


def test_damaged_files_are_named(tmp_path, monkeypatch):
    root = write_folders(tmp_path / "eurosat", ["2750"])
    (root / "2750" / "cat" / "00.jpg").write_text("words")
    (root / "2750" / "dog" / "03.jpg").write_bytes(jpeg(3, height=20, width=31)[:300])
    task = opened(f"torchvision:EuroSAT@{tmp_path}")
    assert [line.partition(":")[0] for line in task.skipped] == ["train-0000000", "train-0000021"]
    assert sum(sizes(task)) == 38
    monkeypatch.setattr(check, "DECODE_WORK", 0)
    with pytest.raises(CorruptSetError, match=r"image \d+ of torchvision:EuroSAT \(train\) cannot be read"):
        contents(opened(f"torchvision:EuroSAT@{tmp_path}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR10", r"torchvision:CIFAR10 is not on disk: looked in .*nowhere"),
        ("Flowers102", r"torchvision:Flowers102 is not on disk: looked in .*nowhere"),
        ("EuroSAT", r"torchvision:EuroSAT is not on disk: looked in .*nowhere"),
        ("CIFAR11", r"no dataset 'CIFAR11'; did you mean torchvision:CIFAR10\?"),
        ("FakeData", "holds no images of its own"),
        ("ImageFolder", "the path of a folder with class folders"),
        ("EMNIST", r"needs more than a folder \(split\)"),
        ("CocoDetection", r"needs more than a folder \(annFile\)"),
        ("", "no dataset ''"),
    ],
)
def test_what_cannot_be_opened(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        opened(f"torchvision:{name}@{tmp_path}/nowhere")
