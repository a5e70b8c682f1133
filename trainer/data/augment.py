"""Colours of whole batches on the training device: jitter, grayscale, blur, solarise, normalise.

The host decides from the drawn parameters which images an operation touches, and sends indices along: nothing is
ever read back from the device.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.colours import BRIGHTNESS, CONTRAST, HUE, OFF, SATURATION, Colours

_BLOCK_PIXELS = 2**22  # images of one block: bounds the memory of the intermediate results (50 MB each)
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_TINY = 1e-3  # of a level, so that a level that equals the threshold is not lost to rounding


def augment(
    images: Tensor,
    colours: Colours,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Images uint8 [N, S, S, 3] with colours [N], on the images' device, as dtype [N, 3, S, S], contiguous.

    In float32 on [0, 1], with the semantics of `torchvision.transforms.functional` on float tensors: ColorJitter's
    operations in each image's own order, clamped after each; grayscale; Gaussian blur with sigma and kernel in pixels
    of the view, reflecting; solarise from `threshold` / 255 on; (x - mean) / std. The result is NCHW, whose first
    dimension can be split into views: channels-last networks convert the three channels at their first convolution
    for next to nothing. Raises ValueError for shapes that do not fit.
    """
    count, size = images.shape[0], images.shape[1]
    if images.shape != (count, size, size, 3) or colours.shape != (count,):
        raise ValueError(f"images {tuple(images.shape)} and colours {colours.shape} do not fit together")
    out = torch.empty((count, 3, size, size), dtype=dtype, device=images.device)
    block = max(1, _BLOCK_PIXELS // (size * size))
    for start in range(0, count, block):
        part = slice(start, start + block)
        out[part] = _augment(images[part], colours[part], mean, std)
    return out


def _augment(
    images: Tensor, colours: Colours, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    x = torch.empty(images.permute(0, 3, 1, 2).shape, dtype=torch.float32, device=images.device)
    x.copy_(images.permute(0, 3, 1, 2)).mul_(1 / 255)
    x = _jitter(x, colours)
    x = _grayscale(x, colours.gray)
    x = _blur(x, colours)
    x = _solarise(x, colours.threshold)
    shift, gain = _sent(np.stack([-np.divide(mean, std), 1 / np.asarray(std)]), x.device)[:, None, :, None, None]
    return x.mul_(gain).add_(shift)


def _sent(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """The values on the device, floats as float32; from pinned memory, so that the host need not wait."""
    array = np.ascontiguousarray(values, dtype=np.float32 if values.dtype.kind == "f" else np.int64)
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _luma(x: Tensor) -> Tensor:
    """[N, 1, S, S]."""
    red, green, blue = x.split(1, 1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def _jitter(x: Tensor, colours: Colours) -> Tensor:
    """At each of the four places, one blend for all images (hue excepted, where its factor is 1), then hue for some.

    Brightness blends with black, contrast with the image's mean grey, saturation with each pixel's grey.
    """
    images = np.flatnonzero(colours.jitter)
    if len(images) == 0:
        return x
    some = None if len(images) == len(x) else _sent(images, x.device)
    chosen = x if some is None else x.index_select(0, some)
    drawn = colours[images]
    tables = _sent(np.stack([_blends(drawn, place) for place in range(4)]), x.device)
    for place in range(4):
        chosen = _blend(chosen, tables[place][..., None, None, None])
        turned = np.flatnonzero((drawn.order[:, place] == HUE) & (drawn.hue != 0))
        if len(turned):
            index = _sent(turned, x.device)
            turns = _sent(drawn.hue[turned], x.device)[:, None, None]
            chosen.index_copy_(0, index, _turn(chosen.index_select(0, index), turns))
    return chosen if some is None else x.index_copy_(0, some, chosen)


def _blends(colours: Colours, place: int) -> NDArray[np.float32]:
    """[3, N]: the image's factor at this place, and the weights of its mean grey and of its pixels' grey."""
    operation = colours.order[:, place]
    factor = np.select(
        [operation == BRIGHTNESS, operation == CONTRAST, operation == SATURATION],
        [colours.brightness, colours.contrast, colours.saturation],
        np.float32(1),
    )
    rest = 1 - factor
    return np.stack([factor, rest * (operation == CONTRAST), rest * (operation == SATURATION)]).astype(np.float32)


def _blend(x: Tensor, table: Tensor) -> Tensor:
    factor, of_mean, of_pixel = table
    gray = _luma(x)
    average = gray.mean((1, 2, 3), keepdim=True)
    other = gray.mul_(of_pixel).addcmul_(average, of_mean)
    return (x * factor).add_(other).clamp_(0, 1)


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """HSV's hue moved by `turns` [N, 1, 1]; value and chroma stay, so the way back needs no division."""
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    scale = torch.where(chroma > 0, chroma, 1).reciprocal_()
    hue = torch.where(
        high == red,
        (green - blue) * scale,
        torch.where(high == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = (hue + 6 * turns).remainder_(6)
    parts = (
        ((hue - 3).abs_() - 1).clamp_(0, 1),
        (2 - (hue - 2).abs_()).clamp_(0, 1),
        (2 - (hue - 4).abs_()).clamp_(0, 1),
    )
    return torch.stack(parts, 1).mul_(chroma[:, None]).add_(low[:, None])


def _grayscale(x: Tensor, gray: NDArray[np.bool_]) -> Tensor:
    images = np.flatnonzero(gray)
    if len(images) == 0:
        return x
    index = _sent(images, x.device)
    return x.index_copy_(0, index, _luma(x.index_select(0, index)).expand(-1, 3, -1, -1))


def _blur(x: Tensor, colours: Colours) -> Tensor:
    """Each image by its own two matrices [S, S], which hold kernel and reflection: two batched products."""
    images = np.flatnonzero(colours.sigma > 0)
    if len(images) == 0:
        return x
    index = _sent(images, x.device)
    sigma = _sent(colours.sigma[images], x.device)
    sides = _sent(colours.kernel[images], x.device)
    size = x.shape[-1]
    across = _blur_matrices(sigma, sides[:, 0], int(colours.kernel[images, 0].max()), size)
    down = _blur_matrices(sigma, sides[:, 1], int(colours.kernel[images, 1].max()), size)
    chosen = x.index_select(0, index)
    rows = torch.bmm(chosen.flatten(1, 2), across.transpose(1, 2)).view_as(chosen)
    return x.index_copy_(0, index, torch.matmul(down[:, None], rows))


def _blur_matrices(sigma: Tensor, sides: Tensor, side: int, size: int) -> Tensor:
    """[N, size, size]: row i holds the weights that pixel i sums over, those outside folded back in."""
    offsets = torch.arange(side, device=sigma.device) - side // 2
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square_())
    weights = weights * (offsets.abs() <= sides[:, None] // 2)
    weights = weights / weights.sum(1, keepdim=True)
    source = (torch.arange(size, device=sigma.device)[:, None] + offsets).abs()
    source = size - 1 - (size - 1 - source).abs()
    matrices = sigma.new_zeros(len(sigma), size, size)
    return matrices.scatter_add_(2, source.expand(len(sigma), -1, -1), weights[:, None].expand(-1, size, -1))


def _solarise(x: Tensor, threshold: NDArray[np.int16]) -> Tensor:
    images = np.flatnonzero(threshold < OFF)
    if len(images) == 0:
        return x
    index = _sent(images, x.device)
    limits = _sent((threshold[images] - _TINY) / 255, x.device)[:, None, None, None]
    chosen = x.index_select(0, index)
    return x.index_copy_(0, index, torch.where(chosen >= limits, 1 - chosen, chosen))
