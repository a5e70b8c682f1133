"""The line that says how it goes: images/s, ETA, failures, the device's waiting time. Goes to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter, deque
from typing import TextIO

from manifests.errors import DiffmixError
from manifests.plan import Plan
from pipeline.events import Committed, Event, Failed, Made, Note

_RATE_WINDOW = 60.0  # seconds over which images/s is taken
_TERMINAL_INTERVAL = 0.5
_PLAIN_INTERVAL = 10.0


class TooManyFailuresError(DiffmixError):
    """More rows failed than --max-failures allows."""


class Progress:
    """Counts events, prints one line that renews itself on a terminal and plain lines elsewhere.

    Args:
        plan: what is being made.
        shards_done: shards committed before this run.
        failed: rows by reason that failed in them.
        max_failures: failed rows of the whole set beyond which the run stops.
    """

    def __init__(
        self, plan: Plan, shards_done: int, failed: Counter[str], max_failures: int, stream: TextIO | None = None
    ) -> None:
        self._plan = plan
        self._shards_done = shards_done
        self._failed_before = failed
        self._max_failures = max_failures
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._failed: dict[str, str] = {}  # reason by key: a shard that is made again counts once
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._printed = 0.0
        self._last = ""
        self._started = time.monotonic()
        self.variations = 0
        self.device_seconds = 0.0
        self.wait_seconds = 0.0

    def __call__(self, event: Event) -> None:
        """Take one event; raises `TooManyFailuresError` when a failure is one too many."""
        match event:
            case Made():
                self._count(event)
            case Failed():
                self._fail(event)
            case Committed():
                self._shards_done += 1
                self._print(force=not self._terminal or self._shards_done == self._plan.shards)
                return
            case Note():
                self.note(event.text)
        self._print()

    def note(self, text: str) -> None:
        """A line of its own."""
        self._write(f"{text}\n")

    def close(self) -> None:
        """Print the last state if it is not there yet, and end the line."""
        if self.line() != self._last:
            self._print(force=True)
        self.end_line()

    def end_line(self) -> None:
        """Leave the line as it is, for what is printed next."""
        if self._terminal and self._printed:
            with contextlib.suppress(OSError):
                self._stream.write("\n")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def failed(self) -> Counter[str]:
        """Failed rows of the whole set by reason."""
        return self._failed_before + Counter(self._failed.values())

    @property
    def _num_failed(self) -> int:
        """Counting the reasons at each of many failures would take a time quadratic in them."""
        return self._failed_before.total() + len(self._failed)

    @property
    def rate(self) -> float:
        """Images a second over the last minute."""
        (first, before), now = self._recent[0], time.monotonic()
        return (self.variations - before) / max(now - first, 1e-9)

    def _count(self, made: Made) -> None:
        self.variations += made.variations
        self.device_seconds += made.device_seconds
        self.wait_seconds += made.wait_seconds
        now = time.monotonic()
        self._recent.append((now, self.variations))
        while len(self._recent) > 2 and now - self._recent[0][0] > _RATE_WINDOW:
            self._recent.popleft()

    def _fail(self, failed: Failed) -> None:
        self._failed[failed.key] = failed.reason
        total = self._num_failed
        if total > self._max_failures:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in self.failed.most_common(5))
            raise TooManyFailuresError(
                f"{total} of {self._plan.rows} rows failed, more than --max-failures allows ({self._max_failures}): "
                f"{reasons}; the last is {failed.source}. Mend such files under the same names, or raise "
                "--max-failures to record them as failed rows, and run the same command again"
            )

    def line(self) -> str:
        """The state in one line."""
        remaining = (self._plan.shards - self._shards_done) / self._plan.shards * self._plan.rows
        images = remaining * max(1, self._plan.variations)
        eta = _duration(images / self.rate) if self.rate > 0 and self.variations else "?"
        total = self.device_seconds + self.wait_seconds
        wait = f"{self.wait_seconds / total:.1%}" if total else "-"
        if self._plan.generator is None:
            return f"shards {self._shards_done}/{self._plan.shards} | failed {self._num_failed}"
        return (
            f"shards {self._shards_done}/{self._plan.shards} | {self.variations} images | {self.rate:.1f} images/s "
            f"| ETA {eta} | failed {self._num_failed} | data wait {wait}"
        )

    def _print(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._printed < (_TERMINAL_INTERVAL if self._terminal else _PLAIN_INTERVAL):
            return
        self._printed = now
        self._last = self.line()
        self._write(self._last + ("" if self._terminal else "\n"))

    def _write(self, text: str) -> None:
        # Nobody may be there to read it any more, or the log's disk be full: no reason to stop working.
        with contextlib.suppress(OSError):
            self._stream.write(f"\r\x1b[K{text}" if self._terminal else text)
            self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
