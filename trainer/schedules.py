"""Settings that change over a run, as pure functions of the step."""

from __future__ import annotations

import math


def linear_warmup(step: int, warmup: int, start: float, end: float) -> float:
    """A straight line from `start` at step 0 to `end` at step `warmup`, `end` from there on."""
    if step >= warmup:
        return end
    return start + (end - start) * step / warmup


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0, warmup_start: float = 0.0) -> float:
    """Half a cosine from `start` to `end`, reached at step `total`, after a linear warm-up from `warmup_start`.

    As in DINO's `cosine_scheduler`, but that the warm-up reaches `start` at step `warmup` and not one step earlier.
    """
    if step < warmup:
        return linear_warmup(step, warmup, warmup_start, start)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def shortened(warmup_steps: int, total_steps: int, share: float = 0.1) -> int:
    """A warm-up or freeze of `warmup_steps`, at most a share of the run: a short run should not be all warm-up."""
    return min(warmup_steps, math.floor(total_steps * share + 1e-6))  # 30 epochs of 200 are .15, to all but rounding
