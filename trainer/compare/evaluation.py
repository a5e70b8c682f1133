"""The same images and the same code for every encoder of a comparison: weighted kNN, linear probe, rank of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifests.errors import UsageError
from trainer.compare.settings import CompareConfig
from trainer.data import tasks
from trainer.data.image_set import ImageSet, Subset
from trainer.data.rows import Rows
from trainer.data.tasks import TaskSpec
from trainer.data.view_plan import ViewConfig
from trainer.evaluate.features import extract
from trainer.evaluate.gather import Features, gather_features
from trainer.evaluate.held_out import pixels, split
from trainer.evaluate.knn import knn_accuracy
from trainer.evaluate.linear import linear_accuracy
from trainer.evaluate.rank import effective_rank
from trainer.evaluate.retention import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """What encoders are asked: labels of `queries`, from the `bank`; `note` says where the queries are from.

    `inputs` are fingerprints of all of it: what a cached answer must have been measured with.
    """

    bank: Part
    queries: Part
    k: int
    temperature: float
    note: str
    inputs: Mapping[str, Any]

    def of_encoder(self, encoder: nn.Module, views: ViewConfig, device: torch.device) -> dict[str, float]:
        """Accuracies in 0..1 and the rank of the queries' features, images resized as the run's full views."""
        bank, queries = self._of(partial(_encoded, encoder, views, device), views.size, device)
        return {**self._accuracies(bank, queries), "feature_rank": effective_rank(queries)}

    def knn_of_encoder(self, encoder: nn.Module, views: ViewConfig, device: torch.device) -> float:
        """Accuracy of kNN alone."""
        return self._knn(*self._of(partial(_encoded, encoder, views, device), views.size, device))

    def of_pixels(self, size: int, device: torch.device) -> dict[str, float]:
        """The same accuracies for the pixels themselves."""
        return self._accuracies(*self._of(pixels, size, device))

    def _of(self, features: Features, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        bank, queries = (
            gather_features(features, part.images, part.indices, size=size, device=device)
            for part in (self.bank, self.queries)
        )
        return bank, queries

    def _accuracies(self, bank: Tensor, queries: Tensor) -> dict[str, float]:
        """No linear probe where the bank is of one class."""
        found = {"knn": self._knn(bank, queries)}
        labels = self.bank.labels, self.queries.labels
        if len(labels[0].unique()) > 1:
            found["linear"] = linear_accuracy(bank, labels[0], queries, labels[1]).accuracy
        return found

    def _knn(self, bank: Tensor, queries: Tensor) -> float:
        labels = self.bank.labels, self.queries.labels
        return knn_accuracy(bank, labels[0], queries, labels[1], k=self.k, temperature=self.temperature)


def open_exam(config: CompareConfig) -> Exam:
    """Bank and queries; raises `UsageError` where there are no labels."""
    bank, queries, note = _of_test(config) if config.test is not None else _of_pairs(config)
    how: dict[str, Any] = {"k": config.evaluation.k, "temperature": config.evaluation.temperature}
    inputs = {"bank": _fingerprint(bank), "queries": _fingerprint(queries), **how}
    return Exam(bank=bank, queries=queries, note=note, inputs=inputs, **how)


def _of_test(config: CompareConfig) -> tuple[Part, Part, str]:
    """All labelled real images of the pair set, and a labelled set whose classes are matched to theirs."""
    assert config.test is not None
    try:
        task = tasks.open_task(TaskSpec(text=f"--test {config.test}", location=config.data, test=config.test))
    except UsageError as error:
        raise UsageError(f"--data {config.data} with --test {config.test}: {error}") from error
    bank, queries = _joined(task.train, task.validation), task.test
    limits = config.evaluation
    return _evenly(bank, limits.bank), _evenly(queries, limits.queries), f"those of {config.test}"


def _of_pairs(config: CompareConfig) -> tuple[Part, Part, str]:
    rows, limits = Rows.open(config.data), config.evaluation
    parts = split(rows, bank=limits.bank, queries=limits.queries)
    if parts is None:
        raise UsageError(
            f"{config.data} has too few labelled real images to compare encoders on; take a set whose source has labels"
        )
    bank, queries = (Part(images=rows, indices=indices) for indices in (parts.bank, parts.queries))
    return bank, queries, "a tenth of the set by hash, which runs may have seen without labels (--test gives others)"


def _joined(*parts: ImageSet) -> Subset:
    """The training and validation part of a task, which are of one set, as one."""
    first, second = parts
    assert isinstance(first, Subset) and isinstance(second, Subset)
    assert first.label is not None and second.label is not None
    indices = np.concatenate([first.indices, second.indices])
    order = np.argsort(indices)
    return Subset(first.whole, indices[order], np.concatenate([first.label, second.label])[order])


def _evenly(images: ImageSet, most: int) -> Part:
    """At most so many, drawn evenly from the whole."""
    count = min(most, len(images))
    return Part(images=images, indices=np.linspace(0, len(images) - 1, count).round().astype(np.int64))


def _encoded(encoder: nn.Module, views: ViewConfig, device: torch.device, images: Tensor) -> Tensor:
    return extract(encoder, [images], mean=views.mean, std=views.std, device=device)


def _fingerprint(part: Part) -> str:
    return Subset(part.images, part.indices).fingerprint
