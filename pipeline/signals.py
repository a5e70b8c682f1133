"""SIGTERM, SIGUSR1 and Ctrl-C: drop the shard in progress and exit 75, so that schedulers requeue the job."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75  # EX_TEMPFAIL: the same command again goes on
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_CLEAN_UP_SECONDS = 20  # schedulers kill 30 s after they asked


class Stopped(BaseException):
    """A signal asked this process to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal_name = signal.Signals(signum).name


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside it the first signal raises `Stopped` in the main thread; later ones do not disturb the clean-up.

    An exception may strike where it leaves a lock of `queue` or `concurrent.futures` taken, or where Python swallows it
    (a finaliser). If the clean-up does not end, the process does, as if it were killed: what is committed stays.
    """
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(RESUMABLE))
        signal.alarm(_CLEAN_UP_SECONDS)
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        if stopped:
            signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
