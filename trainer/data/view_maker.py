"""From item numbers to views in bytes: decode, draw, cut. A pure function that any thread may compute for any items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data import colours, crops, hashing
from trainer.data.augmentations import PLAIN
from trainer.data.colours import Colours
from trainer.data.mixing import Assignment, Policy
from trainer.data.rand_augment import RandAugment
from trainer.data.reader import Reader
from trainer.data.view_plan import ViewPlan

_DRAWS = crops.DRAWS + colours.DRAWS
_RAND_AUGMENT = 1  # names its words

Pixels = NDArray[np.uint8]


class ViewMaker:
    """Makes the views of items; `readers` belong to the sets of `policy`, in its order."""

    def __init__(
        self,
        policy: Policy,
        readers: Sequence[Reader],
        plan: ViewPlan,
        seed: int,
        rand_augment: RandAugment | None = None,
    ) -> None:
        self.policy = policy
        self.readers = readers
        self.plan = plan
        self.seed = seed
        self.rand_augment = rand_augment
        self._num_views = len(plan.crops) + len(plan.local_crops)
        self._runs = plan.runs

    def cut(self, items: NDArray[np.int64], epoch: int, outs: Sequence[Pixels]) -> list[Colours]:
        """Fill `outs`, one uint8 [b, S, S, 3] for each view of the b items; returns what to do to the colours of each.

        Everything random comes from (seed, epoch, item, view).
        """
        assigned = self.policy.assign(items, epoch, self.seed, len(self.plan.crops), len(self.plan.local_crops))
        draws = hashing.uniforms(self.seed, epoch, items, np.arange(self._num_views)[:, None], count=_DRAWS)
        for number, reader in enumerate(self.readers):
            chosen = np.flatnonzero(assigned.set == number)
            if len(chosen) == len(items):
                self._cut_from(reader, assigned, draws, outs)
            elif len(chosen):
                self._cut_some(reader, assigned, draws, chosen, outs)
        if self.rand_augment is not None:
            self._change(self.rand_augment, items, epoch, assigned.plain, outs)
        return self._colours(draws[..., crops.DRAWS :], assigned.plain)

    def _cut_some(
        self,
        reader: Reader,
        assigned: Assignment,
        draws: NDArray[np.float64],
        chosen: NDArray[np.int64],
        outs: Sequence[Pixels],
    ) -> None:
        """`_cut_from` for the items `chosen`, those of one set among others."""
        some = [np.empty((len(chosen), *out.shape[1:]), np.uint8) for out in outs]
        self._cut_from(reader, assigned.of(chosen), draws[:, chosen], some)
        for out, part in zip(outs, some, strict=True):
            out[chosen] = part

    def _cut_from(
        self, reader: Reader, assigned: Assignment, draws: NDArray[np.float64], outs: Sequence[Pixels]
    ) -> None:
        how = self.plan.interpolation
        if reader.cache is not None:
            height, width = reader.cache.shape[1:3]
            slots = reader.slots(assigned.rows, assigned.images)
            boxes, flips = self._boxes(draws, height, width, assigned.plain)
            for view, out in enumerate(outs):
                crops.cut_many(reader.cache, slots[view], boxes[view], flips[view], out.shape[1], out, how)
            return
        pictures, which = _decoded(reader, assigned)
        sides = np.array([picture.shape[:2] for picture in pictures])[which]
        boxes, flips = self._boxes(draws, sides[..., 0], sides[..., 1], assigned.plain)
        for item in range(which.shape[1]):  # all views of an image while it is in the processor's cache
            for view, out in enumerate(outs):
                crops.cut(pictures[which[view, item]], boxes[view, item], flips[view, item], out[item], how)

    def _change(
        self,
        rand_augment: RandAugment,
        items: NDArray[np.int64],
        epoch: int,
        plain: NDArray[np.bool_],
        outs: Sequence[Pixels],
    ) -> None:
        """RandAugment of every view but the plain ones. Its draws are words of their own: they move no crop."""
        views = np.arange(self._num_views)[:, None]
        draws = hashing.uniforms(self.seed, epoch, items, views, _RAND_AUGMENT, count=rand_augment.num_draws)
        for view, item in np.argwhere(~plain):
            rand_augment.apply(outs[view][item], draws[view, item])

    def _boxes(
        self,
        draws: NDArray[np.float64],
        heights: NDArray[np.int64] | int,
        widths: NDArray[np.int64] | int,
        plain: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 [views, b, 4] and flips bool [views, b]."""
        shape = draws.shape[:2]
        heights, widths = np.broadcast_to(heights, shape), np.broadcast_to(widths, shape)
        boxes, flips = np.empty((*shape, 4), np.int32), np.empty(shape, np.bool_)
        for run in self._runs:
            of = slice(run.start, run.stop)
            boxes[of], flips[of] = crops.draw(draws[of, :, : crops.DRAWS], heights[of], widths[of], run.augmentation)
        if plain.any():
            whole, _ = crops.draw(draws[..., : crops.DRAWS], heights, widths, PLAIN)
            boxes, flips = np.where(plain[..., None], whole, boxes), flips & ~plain
        return boxes, flips

    def _colours(self, draws: NDArray[np.float64], plain: NDArray[np.bool_]) -> list[Colours]:
        """For each view, [b]."""
        drawn: list[Colours] = []
        for run in self._runs:
            of = slice(run.start, run.stop)
            run_colours = colours.draw(draws[of], run.augmentation, run.size)
            if plain[of].any():
                run_colours = Colours.where(plain[of], colours.draw(draws[of], PLAIN, run.size), run_colours)
            drawn += [run_colours[view] for view in range(run.stop - run.start)]
        return drawn


def _decoded(reader: Reader, assigned: Assignment) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Every image that feeds a view, decoded once, and which of them feeds each view, int64 [views, b]."""
    pictures: list[Pixels] = []
    reader.expect(assigned.rows, assigned.images)
    which = np.empty(assigned.images.shape, np.int64)
    for item, row in enumerate(assigned.rows.tolist()):
        numbers = assigned.images[:, item].tolist()
        found: dict[int, int] = {}
        for view, number in enumerate(numbers):
            if number not in found:
                found[number] = len(pictures)
                pictures.append(reader.image(row, number))
            which[view, item] = found[number]
    return pictures, which


def cut_plain(reader: Reader, image: int, rows: NDArray[np.int64], out: Pixels) -> None:
    """Image number `image` of `rows`, [B], short side resized and the centre cut, into out [B, S, S, 3]."""
    for position, row in enumerate(rows.tolist()):
        picture = reader.image(row, image)
        box, _ = crops.draw(np.zeros((1, crops.DRAWS)), picture.shape[0], picture.shape[1], PLAIN)
        crops.cut(picture, box[0], False, out[position])
