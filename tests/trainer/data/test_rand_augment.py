"""RandAugment against timm's own, the frequencies of what is drawn, and streams that no thread or restart changes."""

from __future__ import annotations

import random
import threading
from collections import Counter
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms_factory import transforms_imagenet_train

from manifests.errors import UsageError
from tests.trainer.data.builders import open_pairs
from trainer.data import hashing
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig, make
from trainer.data.order import Cursor
from trainer.data.rand_augment import OPERATIONS, RandAugment
from trainer.data.view_plan import ViewConfig

MAE = "rand-m9-mstd0.5-inc1"
SIGNS = {1.0: 1, -1.0: 0}  # seeds of Python's generator whose first number timm takes for this sign
SIGNED = OPERATIONS[3:4] + OPERATIONS[7:]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("pairs") / "set", 22, variations=1)


def timms(text=MAE):
    """timm's, as its training transform makes it for MAE's fine-tuning."""
    made = transforms_imagenet_train(224, auto_augment=text, interpolation="bicubic")
    return next(one for one in made.transforms if isinstance(one, TimmRandAugment))


def photo(side=24, seed=0):
    """Colours with edges and gradients, of all levels."""
    few = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.array(Image.fromarray(few).resize((side, side), Image.Resampling.BICUBIC))


def drawn(count, text=MAE, seed=0):
    rand_augment = RandAugment.parse(text)
    return rand_augment, hashing.uniforms(seed, np.arange(count), count=rand_augment.num_draws)


def noted(count, text=MAE):
    """What is done to each of `count` views: its operations with their magnitudes and signs."""
    rand_augment, draws = drawn(count, text)
    return [list(rand_augment.operations(u)) for u in draws]


def stream(rows, count, *, text=MAE, augment="finetune", **how):
    given = {"num_crops": 1, "num_local_crops": 0, "batch_size": 6, "seed": 3, "device": "cpu", "workers": 1}
    rand_augment = RandAugment.parse(text) if text else None
    views = ViewConfig(augment=augment, size=16)
    with Loader(make(MixConfig(policy="real"), rows), views, **given | how, rand_augment=rand_augment) as batches:
        return [next(batches).views.crops for _ in range(count)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_its_operations_are_those_of_timm():
    assert [op.name for op in timms().ops] == list(OPERATIONS)
    assert timms().num_layers == RandAugment.parse(MAE).num_operations == 2


def test_what_is_read_is_what_timm_reads():
    mine = RandAugment.parse(MAE, IMAGENET_DEFAULT_MEAN)
    theirs = timms().ops[0]
    assert (mine.magnitude, mine.magnitude_std, mine.probability) == (
        theirs.magnitude,
        theirs.magnitude_std,
        theirs.prob,
    )
    assert mine.fill == theirs.kwargs["fillcolor"] == (124, 116, 104)
    assert theirs.kwargs["resample"] == Image.Resampling.BICUBIC
    other = "rand-inc1-p0.25-n3-mstd1"
    mine, theirs = RandAugment.parse(other), rand_augment_transform(other)
    assert (mine.num_operations, mine.magnitude) == (theirs.num_layers, theirs.ops[0].magnitude) == (3, 10)
    assert (mine.probability, mine.magnitude_std) == (theirs.ops[0].prob, theirs.ops[0].magnitude_std) == (0.25, 1)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_timms(name, sign):
    mine = RandAugment.parse(MAE, (0.1, 0.5, 0.7))
    hparams = {"img_mean": mine.fill, "interpolation": Image.Resampling.BICUBIC}
    most = 9.99 if name == "PosterizeIncreasing" else 10.0  # at 10 timm asks for 0 bits, which newer Pillows refuse
    for magnitude in (0.0, 0.3, 5.0, 8.77, 9.0, most):
        for side in (8, 33):
            image = Image.fromarray(photo(side))
            random.seed(SIGNS[sign])
            theirs = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(image)
            assert np.array_equal(np.asarray(mine.changed(image, name, magnitude, sign)), np.asarray(theirs))


def test_nothing_is_left_of_an_image_without_bits():
    image = Image.fromarray(photo())
    assert not np.asarray(RandAugment.parse(MAE).changed(image, "PosterizeIncreasing", 10.0, 1.0)).any()


@pytest.mark.parametrize("name", SIGNED)
def test_signs_go_opposite_ways(name):
    mine, image = RandAugment.parse(MAE), Image.fromarray(photo())
    up, down = (np.asarray(mine.changed(image, name, 9.0, sign)) for sign in (1.0, -1.0))
    assert not np.array_equal(up, down)


def test_operations_are_drawn_evenly_and_half_of_them_done():
    done = noted(6000)
    assert Counter(len(one) for one in done)[1] / 6000 == pytest.approx(0.5, abs=0.02)
    names = Counter(name for one in done for name, _, _ in one)
    assert set(names) == set(OPERATIONS)
    assert sum(names.values()) / 12000 == pytest.approx(0.5, abs=0.015)
    expected = 6000 / 15
    assert sum((count - expected) ** 2 / expected for count in names.values()) < 29.1  # chi-squared, 14 df, 1 %
    pairs = {(one[0][0], one[1][0]) for one in done if len(one) == 2}
    assert len(pairs) == 15**2, "any after any, also the same twice"


def test_magnitudes_are_normal_and_limited():
    done = [one for ops in noted(6000, "rand-m5-mstd0.5-inc1") for one in ops]
    magnitudes = [magnitude for _, magnitude, _ in done]
    assert fmean(magnitudes) == pytest.approx(5, abs=0.03)
    assert pstdev(magnitudes) == pytest.approx(0.5, abs=0.02)
    assert fmean(abs(one - 5) < 0.5 for one in magnitudes) == pytest.approx(0.6827, abs=0.02)
    assert fmean(sign for _, _, sign in done) == pytest.approx(0, abs=0.05)
    nine = [magnitude for ops in noted(6000) for _, magnitude, _ in ops]
    assert max(nine) == 10
    assert fmean(one == 10 for one in nine) == pytest.approx(0.0228, abs=0.007)  # two deviations above
    assert min(magnitude for ops in noted(200, "rand-m0-mstd3-inc1") for _, magnitude, _ in ops) == 0
    assert {magnitude for ops in noted(50, "rand-m7-inc1") for _, magnitude, _ in ops} == {7}


def test_a_view_is_changed_by_its_operations_one_after_the_other():
    rand_augment, draws = drawn(40)
    for u in draws:
        view = photo()
        image = Image.fromarray(photo())
        for operation in rand_augment.operations(u):
            image = rand_augment.changed(image, *operation)
        rand_augment.apply(view, u)
        assert np.array_equal(view, np.asarray(image))


@settings(max_examples=60, deadline=None)
@given(side=st.integers(1, 9), grey=st.booleans(), seed=st.integers(0, 2**31))
def test_tiny_and_grey_views_keep_their_shape(side, grey, seed):
    rand_augment, draws = drawn(4, "rand-m9-mstd3-inc1-p1-n3", seed)  # filled with grey
    view = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    if grey:
        view[:] = view[..., :1]
    for u in (*draws, np.zeros(rand_augment.num_draws), np.full(rand_augment.num_draws, 1 - 2.0**-53)):
        rand_augment.apply(view, u)
        assert not grey or (view == view[..., :1]).all()


def test_no_global_generator_is_touched():
    random.seed(4)
    np.random.seed(4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    rand_augment, draws = drawn(100)
    for u in draws:
        rand_augment.apply(photo(), u)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_streams_are_the_same_for_any_threads_ranks_and_restart(rows):
    whole = stream(rows, 9)
    assert same(stream(rows, 9, workers=3), whole)
    assert same(stream(rows, 9, cache_bytes=0, workers=2), whole)
    assert same(stream(rows, 3, cursor=Cursor(1, 18)), whole[6:])
    ranks = [stream(rows, 9, world_size=2, rank=rank) for rank in (0, 1)]
    assert same([torch.cat([one, other], 1) for one, other in zip(*ranks, strict=True)], whole)


def test_draws_differ_by_seed_epoch_and_item(rows):
    shown = torch.cat(stream(rows, 6, augment="none"), 1)[0]  # two epochs of the same 18 or so images, uncropped
    plain = torch.cat(stream(rows, 6, augment="none", text=None), 1)[0]
    changed = [not torch.equal(one, other) for one, other in zip(shown, plain, strict=True)]
    assert 0.5 < fmean(changed) < 0.95  # 3 in 4 are drawn for something; not all of it changes these pictures
    other = torch.cat(stream(rows, 6, augment="none", seed=4), 1)[0]
    assert not torch.equal(shown, other)


def test_crops_and_flips_stay_as_they_are(rows):
    assert same(stream(rows, 4, text="rand-inc1-p0"), stream(rows, 4, text=None))


def test_threads_at_once_do_not_disturb_each_other():
    rand_augment, draws = drawn(60)
    alone = [photo() for _ in draws]
    for view, u in zip(alone, draws, strict=True):
        rand_augment.apply(view, u)
    crowd = [[photo() for _ in draws] for _ in range(4)]

    def work(views):
        for view, u in zip(views, draws, strict=True):
            rand_augment.apply(view, u)

    threads = [threading.Thread(target=work, args=(views,)) for views in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(views, alone) for views in crowd)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rand",
        "rand-m9-mstd0.5",
        "rand-m9-mstd0.5-inc0",
        "rand-m11-inc1",
        "rand-m9.5-inc1",
        "rand-n0-inc1",
        "rand-p1.5-inc1",
        "rand-mstd11-inc1",
        "rand-m9-m8-inc1",
        "rand-m9-mmax30-inc1",
        "rand-tweights-inc1",
        "rand-mx-inc1",
        "augmix-m5-w4",
        "v0-mstd0.5-inc1",
    ],
)
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UsageError, match=r"images\.rand_augment is .* such as rand-m9-mstd0\.5-inc1"):
        RandAugment.parse(text)
