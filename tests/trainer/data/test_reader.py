"""Reading images: the very pixels that were written, by any way of reading, and errors that name what is hurt."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from manifests.errors import CorruptSetError, StorageError
from manifests.layout import tar_name
from tests.trainer.data.builders import open_pairs, picture, write_pairs
from trainer.data.reader import Reader
from trainer.data.rows import REAL, Rows

IMAGES = (REAL, 0, 1)


def assert_all_read(reader, numbers, **sides):
    for index, number in enumerate(numbers):
        for image in IMAGES:
            assert np.array_equal(reader.image(index, image), picture(number, image, **sides))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_images_are_those_that_were_written(tmp_path, cache_bytes):
    rows = open_pairs(tmp_path / "set", 7, variations=2, shards=3, failed=[2])
    reader = Reader(rows, cache_bytes)
    assert (reader.cache is not None) == (cache_bytes > 0)
    for _ in range(2):
        assert_all_read(reader, [0, 1, 3, 4, 5, 6])
    reader.close()


def test_slots_are_filled_before_they_are_used(tmp_path):
    rows = open_pairs(tmp_path / "set", 6, variations=2)
    reader = Reader(rows)
    indices, images = np.array([[4, 0, 4], [1, 1, 5]]), np.array([[-1, 1, 0], [0, 0, 1]], np.int16)
    assert reader.cache is not None
    found = reader.cache[reader.slots(indices, images)]
    for place in np.ndindex(indices.shape):
        assert np.array_equal(found[place], picture(int(indices[place]), int(images[place])))
    reader.close()


def test_synthetic_sets_have_no_slots_for_real_images(tmp_path):
    reader = Reader(open_pairs(tmp_path / "set", 5, variations=2, real=False))
    assert reader.cache is not None and len(reader.cache) == 10
    assert np.array_equal(reader.cache[reader.slots(np.array([3]), np.array([1], np.int16))][0], picture(3, 1))
    reader.close()


def test_sets_that_do_not_fit_or_differ_in_size_are_not_kept(tmp_path):
    rows = open_pairs(tmp_path / "set", 6)
    pixels = 6 * 2 * 12 * 12 * 3
    assert Reader(rows, pixels - 1).cache is None
    uneven = Reader(open_pairs(tmp_path / "uneven", 6, uneven=True))
    assert uneven.cache is None
    assert np.array_equal(uneven.image(4, 0), picture(4, 0, height=16, width=13))
    uneven.close()


def test_few_files_may_be_open(tmp_path):
    reader = Reader(open_pairs(tmp_path / "set", 8, variations=2, shards=8), cache_bytes=0)
    reader._files._files._most = 3
    assert_all_read(reader, range(8))
    assert len(reader._files._files._files) == 3
    reader.close()
    assert not reader._files._files._files


def test_any_file_system_can_be_read(tmp_path):
    rows = Rows.open(write_pairs("memory://stream-of-tests/set", 5, variations=2, failed=[0]))
    assert_all_read(Reader(rows, cache_bytes=0), [1, 2, 3, 4])


def test_threads_may_share_a_reader(tmp_path):
    reader = Reader(open_pairs(tmp_path / "set", 20, shards=5), cache_bytes=0)
    wrong = []

    def read(first):
        for index in range(20):
            number = (index * 7 + first) % 20
            if not np.array_equal(reader.image(number, 0), picture(number, 0)):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    reader.close()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_damaged_bytes_name_the_image_and_what_to_do(tmp_path, cache_bytes):
    rows = open_pairs(tmp_path / "set", 4)
    with (tmp_path / "set" / tar_name(1)).open("r+b") as file:
        file.seek(rows.places.of(3, 0).offset)
        file.write(b"\0" * 40)
    reader = Reader(rows, cache_bytes)
    reader.image(3, REAL)
    with pytest.raises(
        CorruptSetError, match=r"variation 0 of k3 in .*pairs-000001.tar.*pipeline verify.*pipeline repair"
    ):
        reader.image(3, 0)
    reader.close()


def test_an_image_of_another_size_than_the_manifest_says_is_named(tmp_path):
    other = tmp_path / "other"
    data = open_pairs(other, 3, uneven=True).open_files().bytes(2, REAL)
    reader = Reader(open_pairs(tmp_path / "set", 3, real_data=data))
    with pytest.raises(CorruptSetError, match=r"the real image of k1 .* size is \(14, 14\), not \(12, 12\)"):
        reader.image(1, REAL)
    reader.close()


def test_a_shard_that_ends_too_early_is_named(tmp_path):
    rows = open_pairs(tmp_path / "set", 4, shards=1)
    path = tmp_path / "set" / tar_name(0)
    path.write_bytes(path.read_bytes()[: rows.places.of(2, REAL).offset + 100])
    reader = Reader(rows)
    with pytest.raises(CorruptSetError, match=r"the real image of k2 .* its shard ends"):
        reader.image(2, REAL)
    reader.close()


def test_a_missing_shard_is_named(tmp_path):
    rows = open_pairs(tmp_path / "set", 4)
    (tmp_path / "set" / tar_name(1)).unlink()
    with pytest.raises(StorageError, match=r"pairs-000001.tar: it does not exist"):
        Reader(rows).image(3, REAL)
