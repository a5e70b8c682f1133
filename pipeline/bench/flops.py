"""Floating point operations of one image, and how many a second the device can do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.generators.sd_variations import SDVariations

_MATMULS = 20


def flops_per_image(generator: SDVariations) -> float:
    """Multiplications and additions that `embed` and `vary` do for one image, by shapes: they are run once."""
    # Attention on the CPU is not in torch's list; its count is that of the GPU's kernels.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        generator.vary(generator.embed(torch.zeros(1, 3, generator.side, generator.side)), [0])
    return float(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[2] * (channels + value[3])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on `device`, the best of several: what this very device can reach."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(_MATMULS):
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
