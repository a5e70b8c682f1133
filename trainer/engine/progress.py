"""One line that says how the run is: loss, images/s, data wait, time to go, what the method watches."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import IO

_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.5, 10.0


class ProgressLine:
    """Rewritten in place on a terminal, a plain line now and then elsewhere; silent on ranks that do not speak."""

    def __init__(self, *, speaks: bool, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._speaks = speaks
        self._shown = 0.0
        self._dirty = False
        self.about = ""  # of several runs in a row the one that the lines are about

    def show(self, text: str, *, force: bool = False) -> None:
        """The state now; too frequent calls show nothing."""
        now = time.monotonic()
        if not force and now - self._shown < (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS):
            return
        self._shown = now
        text = self._named(text)
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._dirty = self._terminal

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(("\n" if self._dirty else "") + self._named(text) + "\n")
        self._dirty = False

    def close(self) -> None:
        """End the line that was being rewritten."""
        if self._dirty:
            self._write("\n")
            self._dirty = False

    def _named(self, text: str) -> str:
        return f"{self.about}: {text}" if self.about else text

    def _write(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(text)
                self._stream.flush()


def line_of(values: Mapping[str, float | int], total_steps: int, seconds_left: float | None = None) -> str:
    """The text of one line from the values of metrics.jsonl."""
    parts = [f"step {values['step']}/{total_steps}", f"epoch {values['epoch']}"]
    shown = {"step", "epoch", "images_per_second", "data_wait", "lr", "seconds"}
    parts += [f"{name} {_short(value)}" for name, value in values.items() if name not in shown]
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.0f} images/s")
        parts.append(f"data wait {values['data_wait']:.1%}")
    if seconds_left is not None:
        parts.append(f"to go {duration(seconds_left)}")
    return " | ".join(parts)


def _short(value: float | int) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
