"""Images/s and the share of time spent waiting for data, evaluations left out."""

from __future__ import annotations

import time


class Meter:
    """A clock that can be paused, and what happened since it was last read."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # of training in all, from earlier sessions too
        self._started: float | None = None
        self._window_seconds = 0.0
        self._window_steps = 0
        self._waited = 0.0

    def start(self) -> None:
        """Let the clock run."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock."""
        if self._started is not None:
            passed = time.perf_counter() - self._started
            self.seconds += passed
            self._window_seconds += passed
            self._started = None

    def count(self) -> None:
        """One step more."""
        self._window_steps += 1

    def read(self, images: int, waited: float) -> tuple[float, float]:
        """Images/s and share of waiting since the last reading; `images` of one step, `waited` seconds in all."""
        self.pause()
        seconds = max(self._window_seconds, 1e-9)
        rates = self._window_steps * images / seconds, min(1.0, (waited - self._waited) / seconds)
        self._window_seconds, self._window_steps, self._waited = 0.0, 0, waited
        self.start()
        return rates
