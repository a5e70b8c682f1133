"""The micro-batches of one step after the other, and errors of one rank that wait until all ranks raise them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from manifests.errors import DiffmixError
from trainer.data.batch import Batch
from trainer.nn.collectives import together, world_size


class Feed:
    """Of each step `accumulation` micro-batches of a loader; those of the step before stand in for what it cannot read.

    A rank that fails must take part in that step's collectives, and the next one's where `Watch` looks late.
    """

    def __init__(self, loader: Iterator[Batch], accumulation: int) -> None:
        self._loader, self._accumulation = loader, accumulation
        self._batches: list[Batch] = []
        self._failure: DiffmixError | None = None

    @property
    def has_failed(self) -> bool:
        """Whether an error of this rank waits."""
        return self._failure is not None

    def next(self) -> list[Batch]:
        """Those of the next step; every rank must call. Raises at once, on all, what the first step's cannot be."""
        if not self._batches:
            self._batches = together(self._read)
        elif self._failure is None:
            with self.postponed():
                self._batches = self._read()
        return self._batches

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """A rank's `DiffmixError` waits for `check`: alone it would leave the others in a collective."""
        try:
            yield
        except DiffmixError as error:
            if world_size() == 1:
                raise
            self._failure = self._failure or error

    def check(self) -> None:
        """Raises the error of this rank that waits, if any; to be called by all, in `together`."""
        if self._failure is not None:
            raise self._failure

    def _read(self) -> list[Batch]:
        return [next(self._loader) for _ in range(self._accumulation)]
