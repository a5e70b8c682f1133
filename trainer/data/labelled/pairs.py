"""The labelled real images of a pair set."""

from __future__ import annotations

import numpy as np

from manifests.errors import UsageError
from trainer.data.labelled.base import NO_LABEL, Found
from trainer.data.rows import Rows


def find(url: str) -> Found:
    """All usable rows; rows that failed when the set was made are named as skipped.

    Raises `UsageError` where the set has no real images or no labels.
    """
    rows = Rows.open(url)
    if not rows.has_real:
        raise UsageError(f"{url} has no real images, and a task is made of real ones; give a pair set that has some")
    table = rows.catalog.columns("label", "class_name", "key", "status", "error")
    label = table["label"].fill_null(NO_LABEL).to_numpy().astype(np.int64)
    names: dict[int, str] = {}
    pairs = table.select(["label", "class_name"]).group_by(["label", "class_name"]).aggregate([])
    for pair in pairs.to_pylist():
        if pair["label"] is not None and pair["class_name"] is not None:
            names[pair["label"]] = pair["class_name"]
    failed = np.setdiff1d(np.arange(table.num_rows), rows.positions)
    lost = table.select(["key", "error"]).take(failed).to_pylist()
    skipped = tuple(f"{row['key']}: failed when the set was made ({row['error']})" for row in lost)
    return Found(images=rows, numbers=label[rows.positions], names=names, skipped=skipped)
