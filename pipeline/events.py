"""What workers tell the process that started them; small, picklable, and never needed for correctness."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A batch has left the device."""

    variations: int
    device_seconds: float  # inside embed, vary and similarity
    wait_seconds: float  # the device stood still: reading, handing over


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A row will be recorded as failed."""

    shard: int
    key: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A shard counts from now on."""

    shard: int
    rows_ok: int
    rows_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something the user should read once, such as a smaller batch after running out of memory."""

    text: str


Event = Made | Failed | Committed | Note
