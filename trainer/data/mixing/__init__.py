"""Mixing policies: which image of which row feeds which view. A policy is one class in a file, and one line.

Everything random is a function of (seed, epoch, item), so that it does not matter who computes it, or when.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.choices import class_of
from trainer.data.image_set import ImageSet
from trainer.data.mixing.config import POLICIES, MixConfig
from trainer.data.mixing.policy import Assignment, Policy
from trainer.data.mixing.unread import check_read

__all__ = ["POLICIES", "Assignment", "MixConfig", "Policy", "check_read", "labels_of", "make"]


def make(config: MixConfig, rows: ImageSet) -> Policy:
    """The policy named in `config` over `rows`; raises `UsageError` where the set lacks what it needs."""
    policy: Policy = class_of(POLICIES, config.policy)(config, rows)
    return policy


def labels_of(policy: Policy) -> list[NDArray[np.int32]]:
    """Labels, int32 [N], of each of the policy's sets; raises `UsageError` if one lacks them."""
    labels = [rows.label for rows in policy.sets]
    for rows, label in zip(policy.sets, labels, strict=True):
        if label is None:
            raise UsageError(
                f"{rows.url} has images without a label, and this training needs one for each; of a pair set, "
                "--filter 'label >= 0' takes the images that have one"
            )
    return [label for label in labels if label is not None]
