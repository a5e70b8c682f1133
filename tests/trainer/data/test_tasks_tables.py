"""Tables as tasks: Parquet files and saved datasets, their columns, names and damage."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.errors import CorruptSetError, UsageError
from tests.trainer.data.builders import picture
from tests.trainer.data.task_builders import contents, opened, png, sizes

NAMES = ["cat", "dog", "elk"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def as_structs(numbers):
    return [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]


def write(path, count=60, *, images=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": as_structs(range(count)) if images is None else images, **columns}
    pq.write_table(pa.table(table), path, row_group_size=16)
    return path


def saved(folder, count=60):
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    rows = {"image": as_structs(range(count)), "label": [number % 3 for number in range(count)]}
    dataset = Dataset.from_dict(rows, features=features)
    if folder is not None:
        dataset.save_to_disk(str(folder))
    return dataset


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_images_and_labels_of_a_parquet_file(tmp_path, column, kind):
    images = as_structs(range(60))
    if kind != "struct":
        images = pa.array([png(number) for number in range(60)], getattr(pa, kind)())
    task = opened(write(tmp_path / "set.parquet", images=images, **{column: [number % 3 for number in range(60)]}))
    found = contents(task)
    assert (task.name, task.class_names) == ("set", ("0", "1", "2"))
    for number in range(60):
        key = f"{number}.png" if kind == "struct" else f"row-{number:07d}"
        assert found[key] == (str(number % 3), picture(number).tobytes())


def test_a_folder_of_parquet_files_and_its_splits(tmp_path):
    keys = {"label": [number % 3 for number in range(30)], "id": list(range(30))}
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", 30, **keys)
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", 30, **keys | {"id": list(range(30, 60))})
    task = opened(tmp_path / "set")
    assert sum(sizes(task)) == 60 and "59" in contents(task)
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", 30, **keys)
    with pytest.raises(
        UsageError, match=r"splits test, train; .*--task .*/train\*.parquet,test=.*/test-.*parquet"
    ) as said:
        opened(tmp_path / "set")
    assert sum(sizes(opened(str(said.value).partition("--task ")[2]))) == 90


def test_a_saved_dataset_with_class_names(tmp_path):
    saved(tmp_path / "pets")
    task = opened(tmp_path / "pets")
    assert (task.name, task.class_names) == ("pets", tuple(NAMES))
    assert contents(task)["7.png"] == ("dog", picture(7).tobytes())


def test_class_names_of_a_parquet_file(tmp_path):
    saved(None).to_parquet(str(tmp_path / "pets.parquet"))
    assert opened(tmp_path / "pets.parquet").class_names == tuple(NAMES)


def test_a_saved_dataset_of_splits(tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=saved(None), test=saved(None, 12)).save_to_disk(str(tmp_path / "pets"))
    with pytest.raises(UsageError, match=r"splits test, train; .*--task .*/pets/train,test=.*/pets/test"):
        opened(tmp_path / "pets")
    task = opened(f"{tmp_path}/pets/train,test={tmp_path}/pets/test")
    assert (task.name, len(task.test)) == ("pets", 12)


def test_labels_may_be_texts_truth_values_or_missing(tmp_path):
    texts = write(tmp_path / "texts.parquet", label=[NAMES[number % 3] for number in range(60)])
    assert opened(texts).class_names == tuple(NAMES)
    truths = write(tmp_path / "truths.parquet", label=[number % 2 == 0 for number in range(60)])
    assert opened(truths).class_names == ("0", "1")
    coded = pa.array([NAMES[number % 3] for number in range(60)]).dictionary_encode()
    assert opened(write(tmp_path / "coded.parquet", label=coded)).class_names == tuple(NAMES)
    some = write(
        tmp_path / "some.parquet", label=[None if number == 8 else number % 3 - (number == 9) for number in range(60)]
    )
    assert opened(some).skipped == ("8.png: no label", "9.png: no label")
    with pytest.raises(UsageError, match="column label is double, and labels are whole numbers or texts"):
        opened(write(tmp_path / "floats.parquet", label=[number / 2 for number in range(60)]))


def test_rows_without_an_image_and_damaged_ones_are_named(tmp_path):
    images = as_structs(range(60))
    images[3], images[4], images[5] = None, {"bytes": None, "path": "4.png"}, {"bytes": b"words", "path": "5.png"}
    task = opened(write(tmp_path / "set.parquet", images=images, label=[number % 3 for number in range(60)]))
    assert sum(sizes(task)) == 57
    reasons = [line.partition(": ")[2] for line in task.skipped]
    assert reasons[:2] == ["no image bytes in this row"] * 2 and reasons[2].startswith("not an image")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a", "b"], "label": [0, 1]}, "no column holds images; the columns are image, label"),
        ({"image": [b"a", b"b"], "size": [0, 1]}, "no column of labels; it has image, size"),
        ({"x": [b"a", b"b"], "y": [b"a", b"b"], "label": [0, 1]}, "several columns hold bytes"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "has no rows"),
    ],
)
def test_tables_that_are_no_task(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "set.parquet")


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path / "set.parquet", label=[number % 3 for number in range(60)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        CorruptSetError, match=r"cannot read .*set.parquet as a table: .*check that its files are whole"
    ):
        opened(path)
    saved(tmp_path / "pets")
    arrow = next((tmp_path / "pets").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:500])
    with pytest.raises(CorruptSetError, match=r"cannot read .*pets as a table"):
        opened(tmp_path / "pets")
