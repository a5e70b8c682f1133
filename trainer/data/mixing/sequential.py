"""Sequential training, a baseline of DiffMix (arXiv 2406.12368): one kind of images first, the other afterwards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data.image_set import ImageSet
from trainer.data.mixing.by_row import VARIATIONS, ByRow, Shown
from trainer.data.mixing.config import MixConfig
from trainer.data.rows import REAL


class Sequential(ByRow):
    """All views of a variation for `first_epochs` epochs, of the real image in all later ones, or the other way.

    One run with one schedule. The paper does not publish how its epochs were shared.
    """

    reads = (*ByRow.reads, *VARIATIONS, "first", "first_epochs")
    needs = ("real", "synthetic")

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        super().__init__(config, rows)
        if config.first_epochs is None:
            raise UsageError(
                f"--mix sequential needs the number of epochs that show the {config.first} images, before those of the "
                "others: give --set mix.first_epochs=N, such as half the epochs of the run"
            )
        self._first_epochs = config.first_epochs

    def check_epochs(self, epochs: float) -> None:
        if self._first_epochs >= epochs:
            raise UsageError(
                f"mix.first_epochs is {self._first_epochs} and the run has {epochs:g} epochs, so that it would show "
                f"{self.config.first} images only; give fewer than {epochs:g}, or --mix {self.config.first}"
            )

    def images(self, shown: Shown, num_crops: int, num_local_crops: int) -> NDArray[np.int16]:
        is_synthetic = (self.config.first == "synthetic") == (shown.epoch < self._first_epochs)
        views = num_crops + num_local_crops
        return self.variations(shown, views) if is_synthetic else np.full((views, len(shown.items)), REAL, np.int16)
