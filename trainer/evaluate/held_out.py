"""kNN, linear probe and corruptions on a pair set's own labelled rows, while training and at its end.

10 % of the keys by hash are queries, the rest the bank. Training may see the query images too, without their labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.data.image_set import ImageSet
from trainer.data.view_plan import ViewConfig
from trainer.evaluate.corruptions import CORRUPTIONS
from trainer.evaluate.features import extract
from trainer.evaluate.gather import Features, gather_features
from trainer.evaluate.knn import knn_accuracy
from trainer.evaluate.linear import linear_accuracy
from trainer.evaluate.rank import effective_rank
from trainer.nn.statistics import feature_std

_QUERY_SHARE = 0.1
_PIXELS = 32  # side to which images are reduced where their pixels are the features


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Row numbers and labels of the bank and of the queries."""

    bank: NDArray[np.int64]
    queries: NDArray[np.int64]
    bank_labels: Tensor
    query_labels: Tensor


def split(rows: ImageSet, *, bank: int, queries: int) -> Split | None:
    """At most so many of the labelled real images; None where there are no labels or no real images.

    Rows lie in hash order in a set, so that the first ones are a fair sample. A label below 0 says that there is none.
    """
    labels = rows.label if rows.has_real else None
    if labels is None:
        return None
    some = np.flatnonzero(labels >= 0)[: 2 * bank + 20 * queries]
    chosen = np.array([is_query(key) for key in rows.keys(some)])
    query_rows, bank_rows = some[chosen][:queries], some[~chosen][:bank]
    if len(query_rows) < 2 or len(bank_rows) < 2:
        return None
    of = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Split(bank=bank_rows, queries=query_rows, bank_labels=of[bank_rows], query_labels=of[query_rows])


def is_query(key: str) -> bool:
    """Whether the image is a query: a tenth of all keys, the same ones in every run."""
    word = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"held-out").digest(), "big")
    return word < _QUERY_SHARE * 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Evaluates encoders on a split; every rank must call, each computes a share of the features."""

    rows: ImageSet
    split: Split
    views: ViewConfig
    device: torch.device
    k: int
    temperature: float

    def online(self, encoder: nn.Module) -> dict[str, float | int]:
        """Accuracy of kNN (0 to 1), and effective rank and spread of the features of the queries."""
        bank, queries = self._features(encoder, self.split.bank), self._features(encoder, self.split.queries)
        return {
            "knn": self._knn(bank, queries),
            "feature_rank": effective_rank(queries),
            "feature_std": feature_std(queries).item(),
        }

    def final(self, encoder: nn.Module) -> dict[str, float | int]:
        """Accuracy of kNN clean and under each corruption and of a linear probe, and all of it for raw pixels.

        No linear probe where the bank is of one class.
        """
        values: dict[str, float | int] = {"queries": len(self.split.queries), "bank": len(self.split.bank)}
        for prefix, features in (("", self._of(encoder)), ("pixels_", pixels)):
            bank = self._gather(features, self.split.bank)
            clean = self._gather(features, self.split.queries)
            values[f"{prefix}knn"] = self._knn(bank, clean)
            for name in CORRUPTIONS:
                values[f"{prefix}knn_{name}"] = self._knn(bank, self._gather(features, self.split.queries, name))
            values |= self._linear(f"{prefix}linear", bank, clean)
        return values

    def clean(self, encoder: nn.Module, prefix: str) -> dict[str, float | int]:
        """Of `final` what is measured on clean images: `{prefix}knn` and, of two classes or more, `{prefix}linear`."""
        bank, queries = self._features(encoder, self.split.bank), self._features(encoder, self.split.queries)
        return {f"{prefix}knn": self._knn(bank, queries), **self._linear(f"{prefix}linear", bank, queries)}

    def _knn(self, bank: Tensor, queries: Tensor) -> float:
        labels = self.split.bank_labels, self.split.query_labels
        return knn_accuracy(bank, labels[0], queries, labels[1], k=self.k, temperature=self.temperature)

    def _linear(self, name: str, bank: Tensor, queries: Tensor) -> dict[str, float | int]:
        labels = self.split.bank_labels, self.split.query_labels
        if len(labels[0].unique()) < 2:
            return {}
        return {name: linear_accuracy(bank, labels[0], queries, labels[1]).accuracy}

    def _features(self, encoder: nn.Module, indices: NDArray[np.int64]) -> Tensor:
        return self._gather(self._of(encoder), indices)

    def _of(self, encoder: nn.Module) -> Features:
        def features(images: Tensor) -> Tensor:
            return extract(encoder, [images], mean=self.views.mean, std=self.views.std, device=self.device)

        return features

    def _gather(self, features: Features, indices: NDArray[np.int64], corruption: str | None = None) -> Tensor:
        return gather_features(
            features, self.rows, indices, size=self.views.size, device=self.device, corruption=corruption
        )


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features, reduced to 32 px: what any method should beat. Float32 [B, 3072] or less."""
    values = images.permute(0, 3, 1, 2).float() / 255
    if values.shape[-1] > _PIXELS:
        values = F.interpolate(values, size=(_PIXELS, _PIXELS), mode="area")
    return values.flatten(1)
