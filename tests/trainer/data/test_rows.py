"""Rows as arrays: equal to what the manifest says row by row, and a fingerprint that tells sets apart."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from manifests.catalog import merge
from manifests.errors import CorruptSetError
from tests.trainer.data.builders import open_pairs, write_pairs
from trainer.data import columns
from trainer.data.places import Places
from trainer.data.rows import REAL, Rows


def assert_places(rows, expected):
    """One by one in any order, and again after some were expected."""
    random = np.random.default_rng(0)
    for places in (rows.places, Places(rows.catalog, rows.positions)):
        for index in random.permutation(len(expected)).tolist():
            row = expected[index]
            for image, of in enumerate((row.real, *row.synthetic), REAL):
                assert places.of(index, image) == (row.shard, of.offset, of.size)
    fresh = Places(rows.catalog, rows.positions)
    fresh.expect(np.array([len(rows) - 1, 0]), np.array([[REAL, REAL], [0, 0]], np.int16))
    last = expected[-1].synthetic[-1]
    assert fresh.of(len(rows) - 1, len(expected[-1].synthetic) - 1) == (expected[-1].shard, last.offset, last.size)


@pytest.mark.parametrize("variations", [1, 3])
@pytest.mark.parametrize("failed", [[], [0, 4, 5, 9]])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.filterwarnings("ignore:.*has no manifest")
def test_columns_say_what_the_rows_say(tmp_path, variations, failed, merged):
    rows = open_pairs(tmp_path / "set", 10, variations=variations, failed=failed, merged=merged, shards=3)
    expected = rows.catalog.rows(rows.positions.tolist())
    assert len(rows) == 10 - len(failed) == len(expected)
    assert rows.keys(np.arange(len(rows))) == [row.key for row in expected]
    assert rows.label is not None and rows.label.tolist() == [row.label for row in expected]
    assert_places(rows, expected)
    sizes = [image.size for row in expected for image in (row.real, *row.synthetic)]
    assert rows.encoded_bytes == pytest.approx(sum(sizes), rel=0.02)


def test_keys_come_in_the_order_asked(tmp_path):
    assert open_pairs(tmp_path / "set", 9, failed=[1]).keys([7, 0, 1, 7]) == ["k8", "k0", "k2", "k8"]


def test_filters_choose_rows(tmp_path):
    folder = write_pairs(tmp_path / "set", 9, failed=[1])
    rows = Rows.open(folder, ["label == 1"])
    assert rows.keys(range(len(rows))) == ["k4", "k7"]
    assert_places(rows, rows.catalog.rows([4, 7]))


def test_labels_are_all_or_none(tmp_path):
    assert open_pairs(tmp_path / "set", labelled=False).label is None


def test_one_side_may_be_missing(tmp_path):
    real = open_pairs(tmp_path / "real", variations=0)
    synthetic = open_pairs(tmp_path / "synthetic", real=False)
    assert (real.has_real, real.has_synthetic, synthetic.has_real, synthetic.has_synthetic) == (
        True,
        False,
        False,
        True,
    )
    assert real.image_size == synthetic.image_size == (12, 12)


def test_the_size_is_that_of_all_images_or_none(tmp_path):
    assert open_pairs(tmp_path / "even", failed=[2]).image_size == (12, 12)
    assert open_pairs(tmp_path / "uneven", uneven=True).image_size is None


def test_a_row_that_lacks_variations_is_named(tmp_path, monkeypatch):
    rows = open_pairs(tmp_path / "set", 4, variations=2)
    object.__setattr__(rows.catalog.plan, "variations", 3)
    with pytest.raises(CorruptSetError, match="row k0 has 2 variations and the plan asks for 3"):
        rows.places.of(0, 1)


def test_the_fingerprint_tells_sets_and_selections_apart(tmp_path):
    folder = write_pairs(tmp_path / "set", 12)
    prints = {
        Rows.open(folder).fingerprint,
        Rows.open(folder, ["label == 1"]).fingerprint,
        Rows.open(folder, ["label == 2"]).fingerprint,
        open_pairs(tmp_path / "other", 12, failed=[3]).fingerprint,
        open_pairs(tmp_path / "larger", 13).fingerprint,
    }
    assert len(prints) == 5


def test_the_fingerprint_lives_through_a_move_and_a_new_merge(tmp_path):
    rows = open_pairs(tmp_path / "set", 12)
    before = rows.fingerprint
    merge(rows.catalog.storage, rows.catalog.plan)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert Rows.open(str(tmp_path / "moved"), ["label >= 0"]).fingerprint == before


def _mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)


def test_string_hashes_are_those_of_a_reference_in_plain_python():
    texts = [hashlib.sha256(bytes([n])).hexdigest()[: n % 40] for n in range(90)] + ["", "é", "a" * 8, "a" * 9]

    def reference(text):
        data = text.encode()
        state = _mix(len(data))
        for at in range(0, len(data), 8):
            state = _mix(state ^ _mix(int.from_bytes(data[at : at + 8], "little")))
        return state

    column = pa.chunked_array([pa.array(["x", *texts[:50]]).slice(1), pa.array(texts[50:])])
    assert columns.hashes(column).tolist() == [reference(text) for text in texts]
