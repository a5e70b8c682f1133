import io
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifests.errors import UsageError
from pipeline.sources.base import UnreadableImageError
from pipeline.sources.images import decode
from pipeline.sources.tables import TableSource
from tests.pipeline.sources.pictures import LIMIT, encoded, jpeg, noise

JPEGS = [jpeg(seed) for seed in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def call(name, columns):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
        return str(path)

    return call


def indexed(location):
    source = TableSource(str(location))
    return source, source.index().to_pylist()


def images(location):
    source, rows = indexed(location)
    return {row["key"]: source.read(row["location"], row["offset"], row["size"]) for row in rows}


def huggingface(**columns):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            **({"label": datasets.ClassLabel(names=["cat", "dog"])} if "label" in columns else {}),
            **{name: datasets.Value("string") for name in columns if name not in ("image", "label")},
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_plain_column_of_bytes(write):
    path = write("t.parquet", {"image": JPEGS, "label": [3, 0, -1, 2, 1]})
    source, rows = indexed(path)
    assert [row["key"] for row in rows] == [f"row-{number:07d}" for number in range(5)]
    assert [row["label"] for row in rows] == [3, 0, None, 2, 1]
    assert [row["size"] for row in rows] == [len(data) for data in JPEGS]
    assert list(images(path).values()) == JPEGS


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary()])
def test_row_groups_and_types(write, kind, tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"img": pa.array(JPEGS, kind)}), path, row_group_size=2)
    assert list(images(path).values()) == JPEGS


def test_images_as_huggingface_stores_them_in_parquet(tmp_path):
    values = [{"bytes": data, "path": f"n{number}.jpg"} for number, data in enumerate(JPEGS)]
    huggingface(image=values, label=[0, 1, 1, 0, 1]).to_parquet(tmp_path / "t.parquet")
    source, rows = indexed(tmp_path / "t.parquet")
    assert {(row["label"], row["class_name"]) for row in rows} == {(0, "cat"), (1, "dog")}
    assert {row["location"] for row in rows} == {f"n{number}.jpg" for number in range(5)}
    assert sorted(images(tmp_path / "t.parquet").values()) == sorted(JPEGS)


def test_a_folder_that_datasets_wrote(tmp_path):
    table = huggingface(image=[{"bytes": data, "path": None} for data in JPEGS], label=[0, 1, -1, 0, 1])
    table.select([4, 2, 0]).save_to_disk(tmp_path / "saved")
    source, rows = indexed(tmp_path / "saved")
    assert [row["class_name"] for row in rows] == ["dog", None, "cat"]
    assert list(images(tmp_path / "saved").values()) == [JPEGS[4], JPEGS[2], JPEGS[0]]


def test_of_several_splits_the_one_for_training(tmp_path):
    part = {name: huggingface(image=[{"bytes": JPEGS[at], "path": None}]) for at, name in enumerate(("train", "test"))}
    datasets.DatasetDict(part).save_to_disk(tmp_path / "both")
    assert list(images(tmp_path / "both").values()) == [JPEGS[0]]
    assert list(images(tmp_path / "both" / "test").values()) == [JPEGS[1]]
    datasets.DatasetDict({"a": part["train"], "b": part["test"]}).save_to_disk(tmp_path / "neither")
    with pytest.raises(UsageError, match="splits a, b and none called train"):
        TableSource(str(tmp_path / "neither")).index()


def test_a_test_split_of_parquet_files_stays_out(write, tmp_path):
    write("hub/data/train-00000-of-00002.parquet", {"image": JPEGS[:1]})
    write("hub/data/train-00001-of-00002-1f2e3d4c.parquet", {"image": JPEGS[1:2]})
    write("hub/data/test-00000-of-00001.parquet", {"image": JPEGS[2:]})
    assert sorted(images(tmp_path / "hub").values()) == sorted(JPEGS[:2])
    assert sorted(images(tmp_path / "hub/data/test-*.parquet").values()) == sorted(JPEGS[2:])


def test_names_with_the_signs_of_patterns(write):
    path = write("odd [1] {2} *.parquet", {"image": JPEGS})
    assert list(images(path).values()) == JPEGS


@pytest.mark.parametrize("image_type", ["string", "Image"])
def test_paths_relative_to_the_table(tmp_path, image_type):
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    names = [f"pictures/{number}.jpg" for number in range(4)]
    for name, data in zip(names[:3], JPEGS[:3], strict=True):
        (tmp_path / "set" / name).write_bytes(data)
    (tmp_path / "away.jpg").write_bytes(JPEGS[4])
    names += [str(tmp_path / "away.jpg"), "https://example.org/x.jpg", None]
    column = names if image_type == "string" else [name and {"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": column}), tmp_path / "set" / "t.parquet")
    source, rows = indexed(tmp_path / "set" / "t.parquet")
    found = []
    for row in rows:
        try:
            found.append(source.read(row["location"], row["offset"], row["size"]))
        except UnreadableImageError as error:
            found.append(str(error))
    assert found == [*JPEGS[:3], "missing file", JPEGS[4], "a URL, which is not fetched", "no image in this row"]


def test_keys_come_from_a_key_column_then_from_paths_then_from_the_row(write):
    key = ["a/1", "b", "c", "d", "e"]
    assert "b" in images(write("1.parquet", {"image": JPEGS, "key": key}))
    assert set(images(write("2.parquet", {"image": JPEGS, "id": range(5)}))) == set("01234")
    twice = [{"bytes": data, "path": f"{name}.jpg"} for data, name in zip(JPEGS, "vwxyz", strict=True)]
    found = images(write("3.parquet", {"image": twice, "id": ["same"] * 5}))
    assert {name[0] for name in found} == set("vwxyz")
    same = [{"bytes": data, "path": "image.jpg"} for data in JPEGS]
    assert list(images(write("4.parquet", {"image": same}))) == [f"row-{number:07d}" for number in range(5)]


def test_labels_that_are_words(write):
    path = write("t.parquet", {"image": JPEGS, "class": ["dog", "cat", None, "dog", "ape"]})
    found = [(row["label"], row["class_name"]) for row in indexed(path)[1]]
    assert found == [(2, "dog"), (1, "cat"), (None, None), (2, "dog"), (0, "ape")]


def test_the_column_of_images_is_found_or_asked_for(write):
    path = write("t.parquet", {"thumb": JPEGS, "photo": JPEGS[::-1], "n": range(5)})
    assert list(images(path).values()) == JPEGS[::-1]
    assert list(images(f"{path}::thumb").values()) == JPEGS
    unclear = write("u.parquet", {"left": JPEGS, "right": JPEGS, "n": range(5)})
    with pytest.raises(UsageError, match=r"not clear.*left, right, n; bytes or paths are in left, right.*::COLUMN"):
        TableSource(unclear).index()
    with pytest.raises(UsageError, match="'n' is no column of images"):
        TableSource(f"{unclear}::n").index()
    with pytest.raises(UsageError, match="none of them"):
        TableSource(write("v.parquet", {"n": range(5)})).index()


def test_tables_that_cannot_be_read(write, tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 this is not")
    with pytest.raises(UsageError, match="cannot read"):
        TableSource(str(tmp_path / "no.parquet")).index()
    with pytest.raises(UsageError, match="no rows"):
        TableSource(write("none.parquet", {"image": pa.array([], pa.binary())})).index()
    with pytest.raises(UsageError, match="found nothing"):
        TableSource(str(tmp_path / "gone.parquet")).index()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.csv").touch()
    with pytest.raises(UsageError, match=r"no table in .*found x\.csv"):
        TableSource(str(tmp_path / "folder")).index()


def test_an_empty_file_among_others_does_not_matter(write, tmp_path):
    write("set/0.parquet", {"image": pa.array([], pa.binary())})
    write("set/1.parquet", {"image": JPEGS})
    assert list(images(tmp_path / "set").values()) == JPEGS


def test_damaged_pixels_and_metadata_do_not_matter_to_the_index(write):
    path = write("t.parquet", {"image": [b"", b"nothing", JPEGS[0], None, encoded(noise(), "PNG")]})
    source, rows = indexed(path)
    assert [row["size"] for row in rows] == [0, 7, len(JPEGS[0]), None, len(encoded(noise(), "PNG"))]
    assert source.read(rows[0]["location"], 0, 0) == b""
    with pytest.raises(UnreadableImageError, match="no such row"):
        source.read("row-0000009", 9, 0)


def test_it_goes_to_another_process_and_is_read_in_quiet(write, capfd):
    path = write("t.parquet", {"image": [encoded(noise(), "PNG")]})
    source, [row] = indexed(path)
    copy = pickle.loads(pickle.dumps(source))
    rgb = decode(copy.read(row["location"], row["offset"], row["size"]), max_pixels=LIMIT)
    assert np.array_equal(rgb, np.asarray(Image.open(io.BytesIO(encoded(noise(), "PNG")))))
    assert capfd.readouterr().err == ""
