"""Which box of an image a view shows, and the view cut from it: RandomResizedCrop and flip, on the CPU, in bytes."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer.data.augmentations import Augmentation
from trainer.data.resize import resize, resize_many

_ATTEMPTS = 10
DRAWS = 2 * _ATTEMPTS + 3  # area and ratio of each attempt, top, left, flip

Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64] | NDArray[np.int32] | int


def draw(
    u: NDArray[np.float64], heights: Ints, widths: Ints, augmentation: Augmentation
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Boxes int32 [..., 4] (top, left, height, width) and flips bool [...] from uniforms [..., DRAWS] in [0, 1).

    `heights` and `widths` are those of the images, integers of at least 1 that broadcast to [...]. The distribution
    is that of torchvision's RandomResizedCrop: ten attempts, then the largest central box of an allowed ratio.
    `square` draws boxes of side sqrt(area * ratio), as the reader of the DiffMix reference does.
    """
    shape = u.shape[:-1]
    height = np.broadcast_to(np.asarray(heights, dtype=np.int64), shape)
    width = np.broadcast_to(np.asarray(widths, dtype=np.int64), shape)
    if augmentation.scale is None:
        side = np.minimum(height, width)
        boxes = _centred(side, side, height, width)
    else:
        boxes = _random(u, height, width, augmentation, augmentation.scale)
    flips = np.less(u[..., -1], augmentation.flip)
    return boxes, flips


def _random(
    u: NDArray[np.float64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    augmentation: Augmentation,
    scale: tuple[float, float],
) -> NDArray[np.int32]:
    rows, columns = _sizes(u, height, width, augmentation, scale)
    fits = np.logical_and(rows > 0, rows <= height[..., None])
    fits &= np.logical_and(columns > 0, columns <= width[..., None])
    first = np.argmax(fits, -1, keepdims=True)
    rows = np.take_along_axis(rows, first, -1)[..., 0]
    columns = np.take_along_axis(columns, first, -1)[..., 0]
    top = (u[..., -3] * (height - rows + 1)).astype(np.int64)
    left = (u[..., -2] * (width - columns + 1)).astype(np.int64)
    drawn = np.stack([top, left, rows, columns], -1).astype(np.int32)
    return np.where(np.any(fits, -1, keepdims=True), drawn, _fallback(height, width, augmentation))


def _sizes(
    u: NDArray[np.float64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    augmentation: Augmentation,
    scale: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths [..., attempts] of the boxes tried."""
    low, high = np.log(augmentation.ratio)
    area = (height * width)[..., None] * (scale[0] + u[..., :_ATTEMPTS] * (scale[1] - scale[0]))
    ratio = np.exp(low + u[..., _ATTEMPTS : 2 * _ATTEMPTS] * (high - low))
    columns = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    rows = columns if augmentation.square else np.rint(np.sqrt(area / ratio)).astype(np.int64)
    return rows, columns


def _fallback(height: NDArray[np.int64], width: NDArray[np.int64], augmentation: Augmentation) -> NDArray[np.int32]:
    """The largest central box whose ratio is allowed."""
    low, high = (1.0, 1.0) if augmentation.square else augmentation.ratio
    ratio = width / height
    # At least a pixel: torchvision rounds the side of very thin images to none and fails.
    rows = np.where(ratio < low, np.maximum(np.rint(width / low), 1), height).astype(np.int64)
    columns = np.where(ratio > high, np.maximum(np.rint(height * high), 1), width).astype(np.int64)
    return _centred(np.minimum(rows, height), np.minimum(columns, width), height, width)


def _centred(
    rows: NDArray[np.int64], columns: NDArray[np.int64], height: NDArray[np.int64], width: NDArray[np.int64]
) -> NDArray[np.int32]:
    return np.stack([(height - rows) // 2, (width - columns) // 2, rows, columns], -1).astype(np.int32)


def cut(
    image: NDArray[np.uint8],
    box: NDArray[np.int32],
    flip: bool,
    out: NDArray[np.uint8],
    interpolation: Interpolation = "bilinear",
) -> None:
    """Resize the box of image [H, W, 3] into out [S, S, 3], mirrored where `flip`; both contiguous.

    With antialiasing, as PIL's and torchvision's resize of the cropped image. Raises ValueError for a box that leaves
    the image.
    """
    top, left, rows, columns = map(int, box)
    _check_out(out, (len(out), len(out), 3))
    if min(top, left) < 0 or min(rows, columns) < 1 or top + rows > image.shape[0] or left + columns > image.shape[1]:
        raise _outside(box, image.shape)
    resize(np.ascontiguousarray(image), top, left, rows, columns, bool(flip), interpolation == "bicubic", out)


def cut_many(
    images: NDArray[np.uint8],
    index: NDArray[np.int64],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    size: int,
    out: NDArray[np.uint8],
    interpolation: Interpolation = "bilinear",
) -> None:
    """`cut` of M boxes [M, 4] of images [N, H, W, 3] of one size into out [M, size, size, 3]; box m is of `index[m]`.

    One call for small images that are held in memory. Raises ValueError if anything lies outside.
    """
    _check_out(out, (len(index), size, size, 3))
    if len(index) == 0:
        return
    if index.min() < 0 or index.max() >= len(images):
        raise ValueError(f"index from {index.min()} to {index.max()} into {len(images)} images")
    _check_boxes(boxes, images.shape[1:])
    # Copies of the small ones, since numba compiles anew for arrays that are read-only or have gaps.
    resize_many(
        np.ascontiguousarray(images),
        np.array(index, dtype=np.int64, order="C"),
        np.array(boxes, dtype=np.int64, order="C"),
        np.array(flips, dtype=np.bool_, order="C"),
        interpolation == "bicubic",
        out,
    )


def _check_out(out: Bytes, shape: tuple[int, ...]) -> None:
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} {out.shape} with strides {out.strides}; it must be contiguous uint8 {shape}"
        )


def _check_boxes(boxes: NDArray[np.int32], shape: tuple[int, ...]) -> None:
    top, left, rows, columns = boxes.T
    outside = (np.minimum(top, left) < 0) | (np.minimum(rows, columns) < 1)
    outside |= (top + rows > shape[0]) | (left + columns > shape[1])
    if outside.any():
        raise _outside(boxes[outside.argmax()], shape)


def _outside(box: NDArray[np.int32], shape: tuple[int, ...]) -> ValueError:
    top, left, rows, columns = map(int, box)
    return ValueError(f"box (top {top}, left {left}, {rows} x {columns}) leaves the image of {shape[0]} x {shape[1]}")
