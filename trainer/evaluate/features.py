"""One pass of an encoder over images: the features that every evaluation starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from manifests.errors import DiffmixError


def extract(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    expected: int | None = None,
) -> Tensor:
    """Features float32 [N, D] on the CPU of uint8 batches [B, S, S, 3], in their order.

    Pixels are divided by 255, then normalised by `mean` and `std` (of values in 0..1). The encoder, already on
    `device`, runs in evaluation mode without gradients, under autocast if `dtype` is not float32; afterwards each of
    its modules is in the mode it was in. With `expected`, any other number of images is a `DiffmixError`: nothing was
    padded, dropped or seen twice.
    """
    kind = torch.device(device).type
    parts: list[Tensor] = []
    with _evaluating(encoder), torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            parts.append(encoder(normalised(batch, mean=mean, std=std, device=device)).float().cpu())
    if not parts:
        raise DiffmixError("there is no image to take features of")
    features = torch.cat(parts)
    if expected is not None and len(features) != expected:
        raise DiffmixError(f"features of {len(features)} images were taken, and the set has {expected}")
    return features


def normalised(batch: Tensor, *, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Tensor:
    """Float32 [B, 3, S, S] on `device` of bytes [B, S, S, 3]; `mean` and `std` are of values in 0..1."""
    _check_batch(batch)
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device)).view(1, 3, 1, 1)
    shift = -(torch.tensor(mean, dtype=torch.float32) / torch.tensor(std)).to(device).view(1, 3, 1, 1)
    return batch.to(device, non_blocking=True).permute(0, 3, 1, 2).float() * scale + shift


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_batch(batch: Tensor) -> None:
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(f"images are uint8 [B, S, S, 3]; these are {batch.dtype} {tuple(batch.shape)}")
