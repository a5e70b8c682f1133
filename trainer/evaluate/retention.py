"""How much of the source an adapted encoder still knows: weighted kNN, and a linear probe fitted before fine-tuning.

kNN as the reference measures it (arXiv 2404.17245): bank and queries are both seen by the adapted encoder, k = 20,
T = 0.07. The probe is fitted once, on the encoder as it was, and then only applied: it also notices features that are
still good but have moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.image_set import ImageSet
from trainer.evaluate.gather import Features, gather_features
from trainer.evaluate.knn import knn_accuracy
from trainer.evaluate.linear import LinearProbe, fit_probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some labelled images of a set, by number."""

    images: ImageSet
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Int64 [N]."""
        assert self.images.label is not None
        return torch.from_numpy(np.asarray(self.images.label, np.int64)[self.indices])


@dataclass(slots=True, kw_only=True)
class Retention:
    """Measures encoders on a source; the first one that it sees, the untouched one, is what the probe is fitted to."""

    bank: Part
    queries: Part
    size: int
    device: torch.device
    k: int
    temperature: float
    _probe: LinearProbe | None = field(default=None, init=False)

    def measure(self, features: Features) -> dict[str, float]:
        """Accuracies in 0..1; every rank must call. FloatingPointError if the features are not finite."""
        bank, queries = (self._of(features, part) for part in (self.bank, self.queries))
        labels = self.bank.labels, self.queries.labels
        if self._probe is None and len(labels[0].unique()) > 1:
            self._probe = fit_probe(bank, labels[0])
        knn = knn_accuracy(bank, labels[0], queries, labels[1], k=self.k, temperature=self.temperature)
        found = {"source_accuracy": knn}
        if self._probe is not None:
            found["source_linear_accuracy"] = self._probe.accuracy(queries, labels[1])
        return found

    def _of(self, features: Features, part: Part) -> Tensor:
        return gather_features(features, part.images, part.indices, size=self.size, device=self.device)
