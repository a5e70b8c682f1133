import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from pipeline.sources.base import (
    INDEX_SCHEMA,
    KEY_LENGTH,
    IndexBuilder,
    fingerprint,
    from_text,
    make_key,
    sorted_index,
    to_text,
)

steady = settings(deadline=None, derandomize=True)

# Any name that a file system of bytes can hold, as `os.fsdecode` gives it.
names = st.binary(min_size=1, max_size=60).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
paths = st.one_of(names, st.text(alphabet="ab/.-é\u0301 _1", min_size=1, max_size=120))


def built(rows):
    builder = IndexBuilder()
    for key, size in rows:
        builder.add(key, f"{key}.jpg", label=1, class_name="one", size=size)
    return builder.table()


@steady
@given(paths)
def test_a_key_has_the_grammar_of_keys_and_is_made_from_the_name_alone(name):
    key = make_key(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key)
    assert len(key) <= KEY_LENGTH
    assert key == make_key(name)
    assert make_key(key) == key


@steady
@given(st.lists(paths, unique=True, max_size=60))
def test_different_names_get_different_keys(sample):
    assert len({make_key(name) for name in sample}) == len(sample)


def test_names_that_look_alike_stay_apart():
    family = ["a/b.jpg", "a/b.png", "a-b.jpg", "a/b.JPG", "a b.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg", "caf\udce9.jpg"]
    assert len({make_key(name) for name in family}) == len(family)


def test_keys_are_the_same_on_every_machine_and_version():
    assert make_key("n01440764_10026") == "n01440764_10026"
    assert make_key("cat/photo 1.jpg") == "cat-photo-1-dd1dcf7f8a62"
    assert make_key("猫.jpg") == "e2a1438749d6"


@steady
@given(names)
def test_every_file_name_survives_as_text(name):
    text = to_text(name)
    text.encode("utf-8")
    assert from_text(text) == name


def test_ordinary_names_are_not_changed_as_text():
    assert to_text("Katze/größe 猫.jpg") == "Katze/größe 猫.jpg"
    assert to_text("caf\udce9.jpg") == r"caf\xe9.jpg"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.dictionaries(st.from_regex(r"[a-z0-9_-]{1,5}", fullmatch=True), st.none() | st.integers(0, 9), max_size=20))
def test_an_index_is_sorted_and_its_fingerprint_independent_of_order_and_batches(rows):
    forth, back = built(rows.items()), built(reversed(rows.items()))
    one, other = sorted_index(forth), sorted_index(back)
    assert one.schema == INDEX_SCHEMA
    assert one["key"].to_pylist() == sorted(rows)
    pieces = pa.concat_tables([other.slice(start, 1) for start in range(other.num_rows)] or [other])
    assert fingerprint(one) == fingerprint(pieces)


def test_the_fingerprint_changes_with_every_change_of_an_image():
    rows = [("a", 1), ("b", 2)]
    changed = [[("a", 1)], [("a", 1), ("c", 2)], [("a", 1), ("b", 3)], [("a", 1), ("b", None)]]
    prints = [fingerprint(built(case)) for case in (rows, *changed)]
    assert len(set(prints)) == len(prints)


def test_two_images_with_one_key_are_an_error_that_names_both():
    builder = IndexBuilder()
    for location in ("x.jpg", "y.jpg"):
        builder.add("same", location)
    with pytest.raises(UsageError, match=r"'same'.*'[xy]\.jpg' and '[xy]\.jpg'"):
        sorted_index(builder.table())
