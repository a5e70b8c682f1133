"""Whether to go on: every step all ranks learn whether a loss was not finite or a signal came, at the same step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """On one step: `diverged` if a rank's loss was NaN or infinite, `stop` if a rank was asked to stop."""

    step: int
    items: NDArray[np.int64]  # of this rank
    diverged: bool
    stop: bool


class Watch:
    """On a GPU the flags are read one step late, so that looking does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lag = 1 if device.type == "cuda" else 0
        self._pending: deque[tuple[int, NDArray[np.int64], _Flags]] = deque()

    def look(self, step: int, items: NDArray[np.int64], loss: Tensor, *, stop: bool) -> list[Verdict]:
        """Hand in a step's loss; returns the verdicts that are known by now."""
        asked = torch.tensor(float(stop), device=self._device)
        flags = torch.stack([(~torch.isfinite(loss.detach())).float(), asked])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._pending.append((step, items, _Flags(flags)))
        return self._read(self._lag)

    def drain(self) -> list[Verdict]:
        """All verdicts that are still open."""
        return self._read(0)

    def _read(self, left: int) -> list[Verdict]:
        found = []
        while len(self._pending) > left:
            step, items, flags = self._pending.popleft()
            diverged, stop = flags.read()
            found.append(Verdict(step=step, items=items, diverged=diverged, stop=stop))
        return found


class _Flags:
    """Two flags on their way from the device."""

    def __init__(self, flags: Tensor) -> None:
        self._event = None
        if flags.device.type == "cuda":
            self._host = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flags

    def read(self) -> tuple[bool, bool]:
        if self._event is not None:
            self._event.synchronize()
        first, second = self._host.tolist()
        return bool(first), bool(second)
