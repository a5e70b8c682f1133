"""Whether to go on: at the same step all ranks learn of a loss that is not finite, a signal, or a failure of any."""

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
    """On one step, of any rank: `diverged` if its loss was NaN or infinite, `stop` if it was asked to, `failed`."""

    step: int
    items: NDArray[np.int64]  # of this rank
    diverged: bool
    stop: bool
    failed: bool


class Watch:
    """On a GPU the flags are read one step late, so that looking does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lag = 1 if device.type == "cuda" else 0
        self._pending: deque[tuple[int, NDArray[np.int64], _Flags]] = deque()

    def look(
        self, step: int, items: NDArray[np.int64], loss: Tensor, *, stop: bool, failed: bool = False
    ) -> list[Verdict]:
        """Hand in a step's loss and what this rank met; returns the verdicts that are known by now."""
        diverged = (~torch.isfinite(loss.detach())).float()
        flags = torch.stack([diverged, self._filled(stop), self._filled(failed)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._pending.append((step, items, _Flags(flags)))
        return self._read(self._lag)

    def _filled(self, flag: bool) -> Tensor:
        """On the device; filled there, since a copy from the CPU would wait for all that the device has to do."""
        return torch.full((), float(flag), device=self._device)

    def drain(self) -> list[Verdict]:
        """All verdicts that are still open."""
        return self._read(0)

    def _read(self, left: int) -> list[Verdict]:
        found = []
        while len(self._pending) > left:
            step, items, flags = self._pending.popleft()
            diverged, stop, failed = flags.read()
            found.append(Verdict(step=step, items=items, diverged=diverged, stop=stop, failed=failed))
        return found


class _Flags:
    """Flags on their way from the device."""

    def __init__(self, flags: Tensor) -> None:
        self._event = None
        if flags.device.type == "cuda":
            self._host = torch.empty(len(flags), pin_memory=True).copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flags

    def read(self) -> list[bool]:
        if self._event is not None:
            self._event.synchronize()
        return [bool(flag) for flag in self._host.tolist()]
