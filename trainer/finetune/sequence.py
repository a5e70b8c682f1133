"""Measures of continual learning from the accuracy matrix (Lopez-Paz and Ranzato, 2017; Chaudhry et al., 2018).

`matrix[i][j]` is the accuracy on task j after training on task i, for j <= i: later tasks have no head yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Matrix = list[list[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean over all tasks after the last one."""
    return sum(matrix[-1]) / len(matrix[-1])


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of final accuracy less that just after learning it; None for one task."""
    if len(matrix) < 2:
        return None
    changes = [matrix[-1][task] - matrix[task][task] for task in range(len(matrix) - 1)]
    return sum(changes) / len(changes)


def forgetting(matrix: Matrix) -> list[float]:
    """For each task but the last, its best accuracy before the last task less its final one."""
    return [
        max(matrix[after][task] for after in range(task, len(matrix) - 1)) - matrix[-1][task]
        for task in range(len(matrix) - 1)
    ]


def summary(matrix: Matrix, names: Sequence[str]) -> dict[str, Any]:
    """All of it by name, as in results.json."""
    return {
        "accuracy_matrix": matrix,
        "average_accuracy": average_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forgetting": dict(zip(names, forgetting(matrix), strict=False)),
    }
