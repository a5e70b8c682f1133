"""Filters: which rows each expression keeps, and what is said of those that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest

from manifests.catalog import Catalog
from manifests.errors import UsageError
from tests.trainer.data.builders import write_pairs
from trainer.data.filters import COLUMNS, positions

FAILED = 5


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """24 rows of two variations, one of them failed."""
    folder = tmp_path_factory.mktemp("set") / "pairs"
    return Catalog.open(write_pairs(folder, 24, variations=2, shards=3, failed=[FAILED], uneven=True))


def kept(catalog, *expressions):
    return positions(catalog, expressions).tolist()


NAMES = ("cat", "dog", "a bird")


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("label == 2", lambda n: n % 3 == 2),
        ("label != 2", lambda n: n % 3 != 2),
        ("label in 0,1", lambda n: n % 3 in (0, 1)),
        ("label not in 0, 1", lambda n: n % 3 == 2),
        ("class_name == cat", lambda n: n % 3 == 0),
        ("class_name == 'a bird'", lambda n: n % 3 == 2),
        ("class_name in cat,a bird", lambda n: n % 3 in (0, 2)),
        ("class_name not in cat, dog", lambda n: n % 3 == 2),
        ("class_name != cat", lambda n: n % 3 != 0),
        ("class_name > b", lambda n: n % 3 != 2),
        ("key in k3,k7,unknown", lambda n: n in (3, 7)),
        ("shard < 1", lambda n: n < 8),
        ("shard>=1", lambda n: n >= 8),
        ("real.width >= 13", lambda n: n % 3 >= 1),
        ("real.height == 12", lambda n: n % 5 == 0),
        ("synthetic.height <= 13", lambda n: n % 5 <= 1),
        ("similarity > 0.1", lambda n: n > 10),  # of the least similar variation
        ("similarity >= 1e-1", lambda n: n >= 10),
        ("flagged == false", lambda n: n % 4 != 0),
        ("flagged == True", lambda n: n % 4 == 0),
        ("flagged != true", lambda n: n % 4 != 0),
    ],
)
def test_an_expression_keeps_the_rows_for_which_it_holds(catalog, expression, holds):
    assert kept(catalog, expression) == [n for n in range(24) if n != FAILED and holds(n)]


def test_all_expressions_must_hold(catalog):
    assert kept(catalog, "label == 1", "shard == 0", "similarity > 0.02") == [4, 7]
    assert kept(catalog) == [n for n in range(24) if n != FAILED]


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_can_be_named(catalog, name):
    if name == "source":  # these rows have none, and what is missing never matches
        with pytest.raises(UsageError, match="leaves none"):
            kept(catalog, "source != x")
        return
    expression = {"number": f"{name} > -1", "text": f"{name} != x", "truth": f"{name} in true,false"}
    assert len(kept(catalog, expression[COLUMNS[name].kind])) == 23


def test_a_row_without_the_value_never_matches(tmp_path):
    catalog = Catalog.open(write_pairs(tmp_path / "set", 6, labelled=False))
    for expression in ("label == 0", "label != 0", "class_name != cat", "class_name not in cat,dog"):
        with pytest.raises(UsageError, match="leaves none of 6 rows"):
            kept(catalog, expression)


def test_fractions_are_nested_and_of_the_size_asked(tmp_path):
    catalog = Catalog.open(write_pairs(tmp_path / "set", 400, variations=0))
    sets = [set(kept(catalog, f"fraction {share}")) for share in (0.1, 0.2, 0.5, 1)]
    assert sets[0] < sets[1] < sets[2] < sets[3] == set(range(400))
    for share, found in zip((0.1, 0.2, 0.5), sets[:3], strict=True):
        assert abs(len(found) - 400 * share) < 3.3 * np.sqrt(400 * share * (1 - share))
    narrowed = kept(catalog, "label == 1", "fraction 0.2")
    assert narrowed == sorted(n for n in sets[1] if n % 3 == 1)  # by the key alone


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("similarty > 0.6", "did you mean 'similarity'.*class_name"),
        ("colour == red", "Known: key, label"),
        ("label", "cannot read"),
        ("label = 3", "cannot read"),
        ("label == ", "compares with nothing"),
        ("label in 1,,2", "compares with nothing"),
        ("label == three", "'three'; it must be a number"),
        ("__import__('os').system('x') == 1", "cannot read"),
        ("flagged == 0", "true or false"),
        ("fraction 0", "above 0"),
        ("fraction 1.5", "at most"),
        ("fraction some", "must be a number"),
        ("label == 7", "leaves none of 23 rows"),
    ],
)
def test_what_cannot_be_meant_is_refused(catalog, expression, message):
    with pytest.raises(UsageError, match=message):
        kept(catalog, expression)


def test_what_the_generator_did_not_record_is_refused(tmp_path):
    catalog = Catalog.open(write_pairs(tmp_path / "set", 6, recorded=False))
    with pytest.raises(UsageError, match="similarity, which 6 of 6 rows"):
        kept(catalog, "similarity > 0.6")


def test_columns_of_a_side_that_is_not_there_are_refused(tmp_path):
    real = Catalog.open(write_pairs(tmp_path / "real", 6, variations=0))
    synthetic = Catalog.open(write_pairs(tmp_path / "synthetic", 6, real=False))
    with pytest.raises(UsageError, match="no synthetic images"):
        kept(real, "similarity > 0.6")
    with pytest.raises(UsageError, match="no real images"):
        kept(synthetic, "real.width > 6")


def test_a_set_without_usable_rows_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no usable row"):
        kept(Catalog.open(write_pairs(tmp_path / "set", 3, failed=range(3))))
