"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and stop with exit code 75, so that schedulers requeue the job."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75  # EX_TEMPFAIL: the same command again goes on
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal asked for a stop; the loop looks between two steps."""

    signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Inside it signals are noted instead of obeyed; a second Ctrl-C interrupts at once."""
    request = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and request:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(signum).name

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
