import pytest

from manifests import catalog, layout
from manifests.errors import UsageError
from manifests.plan import Plan, claim
from manifests.shard import EncodedImage, EncodedVariation, Sample, ShardWriter
from manifests.storage import open_storage
from pipeline.sources.base import UnreadableImageError
from pipeline.sources.pairs import PairSource
from tests.pipeline.sources.pictures import jpeg

ROWS = 7


def pair_set(folder, *, shards=2, real=True, finished=True):
    """A set of seven rows, of which `key3` failed."""
    storage = open_storage(str(folder))
    storage.create_folder()
    plan = Plan(
        source={"kind": "folder", "location": "somewhere", "fingerprint": "f"},
        generator=None,
        seed=0,
        variations=1,
        shards=shards,
        rows=ROWS,
        limit=None,
        labelled=True,
        store_real="original" if real else None,
        quality=90,
        max_pixels=100,
    )
    claim(storage, plan)
    numbers = iter(range(ROWS))
    for shard in range(shards if finished else 1):
        writer = ShardWriter(storage, shard, generator=None, labelled=True)
        for _ in range(plan.shard_rows(shard)):
            writer.add(sample(next(numbers), real=real))
        writer.commit()
    if finished:
        catalog.merge(storage, plan)
    return str(folder)


def sample(number, *, real):
    fields = {"key": f"key{number}", "label": number % 3, "class_name": "abc"[number % 3], "source": f"{number}.jpg"}
    if number == 3:
        return Sample(**fields, error="truncated JPEG")
    picture = EncodedImage(data=jpeg(number), width=60, height=40) if real else None
    variation = EncodedVariation(data=jpeg(100 + number), width=60, height=40, seed=number)
    return Sample(**fields, real=picture, synthetic=[variation])


def test_the_real_images_of_a_set_with_their_keys_and_labels(tmp_path):
    source = PairSource(pair_set(tmp_path / "set"))
    rows = source.index().to_pylist()
    assert [row["key"] for row in rows] == [f"key{number}" for number in (0, 1, 2, 4, 5, 6)]
    assert [row["label"] for row in rows] == [0, 1, 2, 1, 2, 0]
    assert [row["class_name"] for row in rows] == list("abcbca")
    assert {row["location"] for row in rows} == {layout.tar_name(0), layout.tar_name(1)}
    read = [source.read(row["location"], row["offset"], row["size"]) for row in rows]
    assert read == [jpeg(number) for number in (0, 1, 2, 4, 5, 6)]
    assert source.ignored == 1


def test_a_set_without_real_images_is_refused(tmp_path):
    with pytest.raises(UsageError, match="only generated images"):
        PairSource(pair_set(tmp_path / "set", real=False)).index()


def test_an_unfinished_set_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be finished"):
        PairSource(pair_set(tmp_path / "set", finished=False)).index()


def test_only_images_of_the_set_are_read(tmp_path):
    source = PairSource(pair_set(tmp_path / "set"))
    for location, offset, size in (("../x.tar", 0, 1), ("plan.json", 0, 1), (layout.tar_name(0), None, None)):
        with pytest.raises(UnreadableImageError, match="not an image of this pair set"):
            source.read(location, offset, size)
    with pytest.raises(UnreadableImageError, match="shorter than its manifest says"):
        source.read(layout.tar_name(0), 0, 10**7)
    with pytest.raises(UnreadableImageError, match=r"cannot read pairs-000009\.tar"):
        source.read(layout.tar_name(9), 0, 1)
