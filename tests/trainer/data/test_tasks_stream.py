"""Tasks through the loader: all that it promises for pair sets, and the labels of what is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import CorruptSetError, UsageError
from tests.trainer.data.builders import open_pairs, picture
from tests.trainer.data.task_builders import opened, png, samples, write_folder, write_tar
from trainer.data import mixing
from trainer.data.augmentations import AUGMENTATIONS
from trainer.data.image_set import Subset
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig
from trainer.data.order import Cursor
from trainer.data.plain_images import PlainImages
from trainer.data.reader import Reader
from trainer.data.view_plan import ViewConfig

BATCH = 12
VIEWS = ViewConfig(augment="finetune", size=12)
PLAIN = ViewConfig(augment="none", size=12, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
KINDS = ("tar", "uneven tar", "folder", "pairs", "digits")


@pytest.fixture(scope="module")
def trains(tmp_path_factory):
    """The train part of a task of each kind, at least 40 images."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tar(folder / "even.tar", samples(range(70)))
    write_tar(folder / "uneven.tar", {k: v for n in range(70) for k, v in samples([n], height=12 + n % 5).items()})
    places = {
        "tar": folder / "even.tar",
        "uneven tar": folder / "uneven.tar",
        "folder": write_folder(folder / "set", 70),
        "pairs": open_pairs(folder / "pairs", 70, variations=1).url,
        "digits": "digits-inverted",
    }
    sets = {kind: opened(place).train for kind, place in places.items()}
    sets["digits"] = Subset(sets["digits"], np.arange(45))
    return sets


def loader(rows, *, views=VIEWS, **how):
    defaults = {"num_crops": 1, "num_local_crops": 0, "batch_size": BATCH, "seed": 3, "device": "cpu", "workers": 1}
    return Loader(mixing.make(MixConfig(policy="real"), rows), views, with_labels=True, **defaults | how)


def steps(rows, count, *, world_size=1, accumulation=1, **how):
    """Items [B], labels [B] and crops [1, B, 3, S, S] of the first global batches, put together from all ranks."""
    loaders = [
        loader(rows, rank=rank, world_size=world_size, accumulation=accumulation, **how) for rank in range(world_size)
    ]
    found = []
    for _ in range(count):
        parts = [next(one) for _ in range(accumulation) for one in loaders]
        assert len({(part.epoch, part.step) for part in parts}) == 1
        items = np.concatenate([part.items for part in parts])
        labels = torch.cat([part.views.labels for part in parts])
        found.append((items, labels, torch.cat([part.views.crops for part in parts], 1)))
    for one in loaders:
        one.close()
    return found


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    split=st.sampled_from([(1, 3), (2, 1), (2, 3), (3, 2), (12, 1)]),
    workers=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    start=st.integers(0, 6),
    cache_bytes=st.sampled_from([0, 1 << 20]),
)
def test_any_ranks_threads_and_restart_go_on_with_the_stream_of_one(
    trains, kind, split, workers, prefetch, start, cache_bytes
):
    rows = trains[kind]
    expected = steps(rows, 8)[start:]
    epoch, step = divmod(start, len(rows) // BATCH)
    world_size, accumulation = split
    found = steps(
        rows,
        8 - start,
        world_size=world_size,
        accumulation=accumulation,
        workers=workers,
        prefetch=prefetch,
        cache_bytes=cache_bytes,
        cursor=Cursor(epoch, step * BATCH),
    )
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one[0], other[0])
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_the_images_shown(trains, kind):
    rows = trains[kind]
    with loader(rows, views=PLAIN) as batches:
        for _ in range(5):
            batch = next(batches)
            labels = batch.views.labels
            assert labels is not None and labels.dtype == torch.int64 and labels.shape == (BATCH,)
            assert labels.tolist() == rows.label[batch.items].tolist()
            if kind in ("tar", "folder"):
                keys = [key.rpartition("/")[2].removesuffix(".png") for key in batches.keys(batch.items, batch.epoch)]
                for key, label, shown in zip(keys, labels.tolist(), batch.views.crops[0], strict=True):
                    assert label == int(key) % 3
                    expected = torch.from_numpy(picture(int(key)).astype(np.float32) / 255).permute(2, 0, 1)
                    assert torch.allclose(shown, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_shows_every_image_once(trains, kind):
    with loader(trains[kind], batch_size=5) as batches:
        for _ in range(2):
            items = np.concatenate([next(batches).items for _ in range(batches.steps_per_epoch)])
            assert len(np.unique(items)) == len(items) == len(trains[kind]) // 5 * 5


def test_small_sets_of_one_size_are_kept_decoded(trains):
    for kind, is_kept in (("tar", True), ("uneven tar", False), ("folder", True), ("pairs", True), ("digits", True)):
        reader = Reader(trains[kind])
        assert (reader.cache is not None) == is_kept, kind
        if reader.cache is not None:
            assert np.array_equal(
                reader.cache[reader.slots(np.array([7]), np.array([-1], np.int16))][0], reader.image(7, -1)
            )
        reader.close()


def test_plain_images_take_any_set(trains):
    for rows in trains.values():
        batches = [*PlainImages(rows, np.arange(30), size=12, batch_size=8, workers=2)]
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist() == rows.label[:30].tolist()
        pixels = torch.cat([pixels for pixels, _ in batches])
        assert pixels.dtype == torch.uint8 and pixels.shape == (30, 12, 12, 3)


def test_labels_come_only_where_asked(trains, tmp_path):
    policy = mixing.make(MixConfig(policy="real"), trains["tar"])
    how = {"num_crops": 1, "num_local_crops": 0, "batch_size": 4, "seed": 0, "device": "cpu", "workers": 1}
    with Loader(policy, VIEWS, **how) as batches:
        assert next(batches).views.labels is None
    unlabelled = open_pairs(tmp_path / "pairs", 12, labelled=False)
    with pytest.raises(UsageError, match=r"has images without a label.*label >= 0"):
        loader(unlabelled)


def test_labels_of_items_that_are_several_images(tmp_path):
    rows = open_pairs(tmp_path / "pairs", 20, variations=2)
    for policy in ("union", "inflate", "diffmix"):
        made = mixing.make(MixConfig(policy=policy, replicas=2), rows)
        how = {"num_crops": 2, "num_local_crops": 0, "batch_size": 10, "seed": 0, "device": "cpu", "workers": 1}
        with Loader(made, VIEWS, with_labels=True, **how) as batches:
            for _ in range(5):
                batch = next(batches)
                assert batch.views.labels is not None
                keys = batches.keys(batch.items, batch.epoch)
                assert batch.views.labels.tolist() == [int(key[1:]) % 3 for key in keys]


def test_tasks_have_no_synthetic_images(trains):
    with pytest.raises(UsageError, match="--mix diffmix needs real and synthetic images"):
        mixing.make(MixConfig(policy="diffmix"), trains["folder"])


def test_an_image_that_is_damaged_later_stops_the_stream_with_its_name(tmp_path):
    folder = write_folder(tmp_path / "set", 60)
    train = opened(folder).train
    (folder / train.keys([3])[0]).write_bytes(png(0)[:90])
    with loader(train) as batches, pytest.raises(CorruptSetError, match=rf"{train.keys([3])[0]} cannot be read"):
        for _ in range(8):
            next(batches)


def test_the_augmentations_of_fine_tuning():
    (photos,), (digits,) = (AUGMENTATIONS[name].views for name in ("finetune", "finetune-digits"))
    assert (photos.scale, photos.flip, digits.scale, digits.flip) == ((0.08, 1.0), 0.5, (0.7, 1.0), 0.0)
    for view in (photos, digits):
        assert (view.jitter, view.grayscale, view.blur, view.solarize) == (0, 0, 0, 0)
