"""The loader: the right pixels in every view, the same for any threads and after any restart, and a clean end."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import CorruptSetError, UsageError
from manifests.layout import tar_name
from tests.trainer.data.builders import open_pairs, picture, write_pairs
from trainer.data import augmentations
from trainer.data.loader import Loader
from trainer.data.mixing import POLICIES, MixConfig, make
from trainer.data.order import Cursor
from trainer.data.plain_images import PlainImages
from trainer.data.rows import REAL
from trainer.data.threads import Crew, default_workers
from trainer.data.view_plan import ViewConfig, ViewPlan

ROWS, K = 22, 2
VIEWS = ViewConfig(augment="dino", size=16, local_size=8)
PLAIN = ViewConfig(augment="none", size=12, local_size=12)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("even") / "set", ROWS, variations=K)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("uneven") / "set", ROWS, variations=K, uneven=True, failed=[3])


def loader(rows, *, mix=None, views=VIEWS, local=3, **settings):
    defaults = {"num_crops": 2, "num_local_crops": local, "batch_size": 4, "seed": 5, "device": "cpu", "workers": 1}
    return Loader(make(mix or MixConfig(), rows), views, **defaults | settings)


def stream(rows, count, **settings):
    with loader(rows, **settings) as batches:
        return [next(batches) for _ in range(count)]


def assert_equal(one, other):
    assert (one.epoch, one.step) == (other.epoch, other.step)
    assert np.array_equal(one.items, other.items)
    assert torch.equal(one.views.crops, other.views.crops)
    assert (one.views.local_crops is None) == (other.views.local_crops is None)
    if one.views.local_crops is not None:
        assert torch.equal(one.views.local_crops, other.views.local_crops)


def normalised(pixels):
    return torch.from_numpy(((pixels / 255 - PLAIN.mean) / PLAIN.std).astype(np.float32)).permute(2, 0, 1)


def test_batches_have_the_shapes_promised(rows):
    batch = stream(rows, 1)[0]
    assert batch.views.crops.shape == (2, 4, 3, 16, 16)
    assert batch.views.local_crops is not None and batch.views.local_crops.shape == (3, 4, 3, 8, 8)
    assert batch.views.crops.dtype == torch.float32
    assert stream(rows, 1, local=0)[0].views.local_crops is None
    assert stream(rows, 1, dtype=torch.bfloat16)[0].views.crops.dtype == torch.bfloat16


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_views_show_the_images_that_the_policy_names(rows, cache_bytes):
    mix = MixConfig(synthetic_view="random", synthetic_crops=4, probability=0.7, same_variation=False)
    with loader(rows, mix=mix, views=PLAIN, num_crops=7, local=0, cache_bytes=cache_bytes) as batches:
        for _ in range(8):
            batch = next(batches)
            found = batches.policy.assign(batch.items, batch.epoch, 5, 7, 0)
            for view, item in np.ndindex(found.images.shape):
                expected = normalised(picture(int(batch.items[item]), int(found.images[view, item])))
                assert torch.allclose(batch.views.crops[view, item], expected, atol=1e-4)
    assert found.images.min() == REAL and found.images.max() == K - 1


def test_generated_images_of_another_set_are_shown(rows, tmp_path):
    generated = write_pairs(tmp_path / "set", 9, variations=1, real=False)
    mix = MixConfig(policy="inflate", replicas=1, generated=generated)
    with loader(rows, mix=mix, views=PLAIN, local=0) as batches:
        assert batches.num_items == ROWS + 9
        for batch, _ in zip(batches, range(batches.steps_per_epoch), strict=False):
            for view in batch.views.crops:
                for item, shown in zip(batch.items.tolist(), view, strict=True):
                    name = (item, REAL) if item < ROWS else (item - ROWS, 0)
                    assert torch.allclose(shown, normalised(picture(*name)), atol=1e-4)
        assert batches.keys(np.array([3, ROWS + 8, 0]), 0) == ["k3", "k8", "k0"]
        assert batches.fingerprint.startswith(f"{rows.fingerprint}+")


def test_synthetic_views_go_without_augmentation_where_asked(uneven):
    sides = {"height": 16, "width": 12}
    chosen = [n for n in range(ROWS) if n % 5 == 4 and n % 3 == 0]  # 4 rows below and 4 above to leave out
    mix = MixConfig(augment_synthetic=False, variation=1)
    views = ViewConfig(augment="simclr", size=12)
    with loader(uneven, mix=mix, views=views, local=0, batch_size=21) as batches:
        batch = next(batches)
        keys = batches.keys(batch.items, batch.epoch)
    for number in chosen:
        pixels = picture(number, 1, **sides)[2:14]  # the centre of 16 rows
        at = keys.index(f"k{number}")
        assert torch.allclose(batch.views.crops[1, at], normalised(pixels), atol=1e-4)
        assert not torch.allclose(batch.views.crops[0, at], normalised(picture(number, REAL, **sides)[2:14]), atol=0.1)
    assert chosen


@pytest.mark.parametrize("policy", POLICIES)
def test_an_epoch_shows_every_item_once(uneven, policy):
    with loader(uneven, mix=MixConfig(policy=policy, replicas=2, first_epochs=1), local=1, batch_size=3) as batches:
        for epoch in range(2):
            seen = [next(batches) for _ in range(batches.steps_per_epoch)]
            assert [(batch.epoch, batch.step) for batch in seen] == [(epoch, step) for step in range(len(seen))]
            items = np.concatenate([batch.items for batch in seen])
            assert len(np.unique(items)) == len(items) == batches.num_items // 3 * 3


@settings(max_examples=12, deadline=None)
@given(
    workers=st.integers(1, 4),
    prefetch=st.integers(0, 3),
    start=st.integers(0, 12),
    cache_bytes=st.sampled_from([0, 1 << 20]),
    policy=st.sampled_from([*POLICIES]),
)
def test_any_restart_with_any_threads_goes_on_bit_for_bit(rows, workers, prefetch, start, cache_bytes, policy):
    mix = MixConfig(policy=policy, probability=0.5, first_epochs=1)
    undisturbed = stream(rows, 14, mix=mix)
    with loader(rows, mix=mix) as batches:
        epoch, step = divmod(start, batches.steps_per_epoch)
    again = stream(
        rows,
        14 - start,
        mix=mix,
        cursor=Cursor(epoch, step * 4),
        workers=workers,
        prefetch=prefetch,
        cache_bytes=cache_bytes,
    )
    for one, other in zip(undisturbed[start:], again, strict=True):
        assert_equal(one, other)


def test_a_device_gets_the_views_that_the_threads_would_make(uneven):
    """As on a GPU: bytes from the threads, colours by `augment` afterwards."""
    threads = stream(uneven, 3, batch_size=10)
    with loader(uneven, batch_size=10, workers=3) as batches:
        batches._on_cpu = False
        for expected in threads:
            batch = next(batches)
            assert np.array_equal(batch.items, expected.items)
            for one, other in (
                (batch.views.crops, expected.views.crops),
                (batch.views.local_crops, expected.views.local_crops),
            ):
                assert one is not None and other is not None and one.shape == other.shape
                levels = (one - other).abs().amax((2, 3, 4)) * 255 * min(VIEWS.std)
                assert levels.max() < 6  # of 255; another view, or other colours, would differ by dozens


def test_parts_of_any_size_give_the_same_batch(uneven, monkeypatch):
    whole = stream(uneven, 3, batch_size=12)
    monkeypatch.setattr("trainer.data.loader._PART_PIXELS", 1)
    for one, other in zip(whole, stream(uneven, 3, batch_size=12, workers=3), strict=True):
        assert_equal(one, other)


def test_views_differ_between_items_epochs_and_seeds(rows):
    views = ViewConfig(augment="simclr", size=16)
    ordinary = stream(rows, 6, views=views, mix=MixConfig(policy="real"), local=0)
    crops = torch.cat([batch.views.crops.flatten(0, 1) for batch in ordinary])
    assert len(torch.unique(crops, dim=0)) == len(crops)
    other = stream(rows, 6, views=views, mix=MixConfig(policy="real"), local=0, seed=6)
    by_item = {int(item): batch.views.crops[:, n] for batch in ordinary for n, item in enumerate(batch.items)}
    for batch in other:
        for number, item in enumerate(batch.items.tolist()):
            if item in by_item:
                assert not torch.equal(by_item[item], batch.views.crops[:, number])


def test_a_damaged_image_stops_the_stream_with_its_name(tmp_path):
    rows = open_pairs(tmp_path / "set", 6)
    with (tmp_path / "set" / tar_name(0)).open("r+b") as file:
        file.seek(rows.places.of(1, REAL).offset)
        file.write(b"\0" * 64)
    with loader(rows, workers=3, batch_size=2) as batches, pytest.raises(CorruptSetError, match="real image of k1"):
        for _ in range(4):
            next(batches)


def loader_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("diffmix-loader")]


def test_threads_end_with_the_loader(rows):
    batches = loader(rows, workers=3)
    next(batches)
    assert len(loader_threads()) == 3
    batches.close()
    batches.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        for _ in range(9):
            next(batches)
    forgotten = loader(rows, workers=2)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not loader_threads()


def test_threads_end_with_an_error_in_the_training_step(rows):
    with contextlib.suppress(ZeroDivisionError), loader(rows, workers=2) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert not loader_threads()


def test_waiting_is_counted(rows):
    with loader(rows, prefetch=0) as batches:
        for _ in range(3):
            next(batches)
        assert 0 < batches.wait_seconds < 60


_SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job would ignore it
import sys
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig, make
from trainer.data.rows import Rows
from trainer.data.view_plan import ViewConfig
batches = Loader(make(MixConfig(), Rows.open(sys.argv[1])), ViewConfig(size=16), num_crops=2, num_local_crops=0,
                 batch_size=4, seed=0, device="cpu", workers=2)
try:
    for batch in batches:
        print(batch.step, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_interrupt_is_heard_and_the_process_ends_without_close(rows):
    command = [sys.executable, "-c", _SCRIPT, rows.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert printed.endswith("interrupted\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 64}, "batch of 64 items .* 22 usable"),
        ({"batch_size": 6, "world_size": 2, "accumulation": 2}, "4 or 8"),
        ({"cursor": Cursor(0, 3)}, "3 samples into epoch 0"),
        ({"mix": MixConfig(synthetic_crops=3)}, "takes 2 crops"),
    ],
)
def test_what_cannot_work_is_refused_before_a_thread_starts(rows, settings, message):
    with pytest.raises(UsageError, match=message):
        loader(rows, **settings)
    assert not loader_threads()


@pytest.mark.parametrize(
    "setting",
    [{"augment": "simclrr"}, {"size": 0}, {"scale": (0.5, 0.2)}, {"std": (0.2, 0.2, 0.0)}, {"interpolation": "cubic"}],
)
def test_views_out_of_range_are_refused(setting):
    with pytest.raises(UsageError):
        ViewConfig(**setting)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_crops_are_resized_as_asked(rows, cache_bytes):
    """The same boxes by both filters: near one another, the bicubic ones sharper."""
    settings = {"augment": "none", "size": 20, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    batches = [
        next(loader(rows, views=ViewConfig(**settings, interpolation=how), cache_bytes=cache_bytes)).views.crops
        for how in ("bilinear", "bicubic")
    ]
    assert 0 < (batches[0] - batches[1]).abs().mean() < 0.1
    contrasts = [(crops[..., 1:] - crops[..., :-1]).abs().mean() for crops in batches]
    assert contrasts[1] > contrasts[0]


def test_a_plan_repeats_the_last_view_and_replaces_scales():
    plan = ViewPlan.of(ViewConfig(augment="dino", scale=(0.25, 1), local_scale=(0.05, 0.25)), 3, 2)
    first, second = augmentations.AUGMENTATIONS["dino"].views
    assert [view.blur for view in plan.crops] == [first.blur, second.blur, second.blur]
    assert {view.scale for view in plan.crops} == {(0.25, 1)}
    assert [view.scale for view in plan.local_crops] == [(0.05, 0.25)] * 2
    plain = ViewPlan.of(ViewConfig(augment="simclr"), 2, 1)
    assert plain.local_crops[0].scale == augmentations.LOCAL_SCALE
    assert [(run.start, run.stop, run.size) for run in plain.runs] == [(0, 2, 224), (2, 3, 96)]
    assert [(run.start, run.stop) for run in plan.runs] == [(0, 1), (1, 3), (3, 5)]


def test_workers_are_this_process_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (default_workers(alone=True), default_workers(alone=False)) == (16, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers(alone=True) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_workers(alone=True) == 1


def test_a_crew_skips_the_rest_of_a_task_after_an_error():
    done = []

    def fail():
        raise KeyError("here")

    crew = Crew(1)
    task = crew.do([lambda: done.append(0), fail, lambda: done.append(2)])
    with pytest.raises(KeyError, match="here"):
        task.wait()
    crew.do([lambda: done.append(3)]).wait()
    crew.close()
    assert done == [0, 3]


def test_plain_images_come_whole_and_in_order(uneven):
    indices = np.array([5, 0, 20, 9, 9])
    images = PlainImages(uneven, indices, size=12, batch_size=2, workers=2)
    batches = [*images]
    assert len(images) == 3 == len(batches)
    numbers = [int(key[1:]) for key in uneven.keys(indices)]
    pixels = torch.cat([pixels for pixels, _ in batches])
    labels = torch.cat([labels for _, labels in batches if labels is not None])
    assert pixels.dtype == torch.uint8 and pixels.shape == (5, 12, 12, 3)
    assert labels.tolist() == [number % 3 for number in numbers]
    for shown, number in zip(pixels.numpy(), numbers, strict=True):
        whole = picture(number, REAL, height=12 + number % 5, width=12 + number % 3)
        side = min(whole.shape[:2])
        if side == 12:  # nothing to resize: the centre itself
            top, left = ((length - 12) // 2 for length in whole.shape[:2])
            assert np.array_equal(shown, whole[top : top + 12, left : left + 12])
    assert not loader_threads()


def test_plain_images_can_be_left_half_way(rows):
    for pixels, labels in PlainImages(rows, np.arange(20), size=8, batch_size=3, image=1):
        assert pixels.shape == (3, 8, 8, 3) and labels is not None
        break
    gc.collect()
    assert not loader_threads()
