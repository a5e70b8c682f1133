"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and stop with exit code 75, so that schedulers requeue the job."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75  # EX_TEMPFAIL: the same command again goes on
_TORCHRUN_REPEATS = 2.0  # seconds in which one Ctrl-C may come twice: from the terminal, and passed on by torchrun
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal asked for a stop; the loop looks between two steps."""

    signal_name = ""
    since = 0.0  # when it came first, by `time.monotonic`

    def __bool__(self) -> bool:
        return bool(self.signal_name)


_outer: list[StopRequest] = []  # the one that is open, if any


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Inside it signals are noted instead of obeyed; a second Ctrl-C interrupts at once.

    Inside another one it is that one: a signal that comes as a run ends also stops the comparison that it is of.
    """
    if _outer:
        yield _outer[0]
        return
    request = StopRequest()
    patience = _TORCHRUN_REPEATS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and request and time.monotonic() >= request.since + patience:
            raise KeyboardInterrupt
        if not request:  # `print` is not safe in a handler
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), b"\nstopping after this step ...\n")
        request.since = request.since or time.monotonic()
        request.signal_name = signal.Signals(signum).name

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    _outer.append(request)
    try:
        yield request
    finally:
        _outer.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
