"""Weighted k-nearest-neighbour classification of features (Wu et al., arXiv:1805.01978; as in DINO's `eval_knn.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 2**25  # similarities held at once: 128 MiB


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share in 0..1 of the queries [M, D] whose label [M] the k nearest of the bank [N, D] vote for, see `knn_predict`.

    A label that the bank does not have counts as wrong.
    """
    if len(queries) != len(query_labels) or not len(queries):
        raise ValueError(
            f"{len(queries)} queries came with {len(query_labels)} labels; equal and at least one are needed"
        )
    predicted = knn_predict(bank, bank_labels, queries, k, temperature)
    return (predicted == query_labels.to(predicted.device)).double().mean().item()


@torch.inference_mode()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Labels int64 [M], on the bank's device, for queries [M, D], voted by their neighbours in the bank [N, D].

    The k nearest by cosine similarity s (all, if the bank has fewer) vote with weight exp(s / temperature). Labels
    [N] are any integers. Memory does not grow with M x N. Raises `ValueError` for sizes that do not match and for
    features that are not finite.
    """
    _check(bank, bank_labels, queries, k)
    classes, votes_for = bank_labels.to(bank.device).unique(return_inverse=True)
    bank = F.normalize(bank.float(), dim=1).T.contiguous()
    chunks = queries.split(max(1, _CELLS // bank.shape[1]))
    winners = [_vote(bank, votes_for, chunk, len(classes), min(k, bank.shape[1]), temperature) for chunk in chunks]
    return classes[torch.cat(winners)] if winners else classes.new_empty(0)


def _vote(bank: Tensor, votes_for: Tensor, queries: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Position of the winning class for each query; `bank` is [D, N], normalised."""
    similarity, neighbours = (F.normalize(queries.to(bank.device).float(), dim=1) @ bank).topk(k, dim=1)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # less the nearest's: no overflow, the same winner
    return similarity.new_zeros(len(queries), classes).scatter_add_(1, votes_for[neighbours], weight).argmax(dim=1)


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or len(bank) != len(bank_labels):
        raise ValueError(
            f"bank {tuple(bank.shape)} with labels {tuple(bank_labels.shape)} and queries {tuple(queries.shape)}: "
            "[N, D] with [N] and [M, D] are needed"
        )
    if not len(bank) or k < 1:
        raise ValueError(f"a bank of {len(bank)} features and k={k}; both must be at least 1")
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise ValueError("features are not finite: the encoder has diverged")
