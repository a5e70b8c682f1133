"""What all legs of a comparison share: the untouched encoder, the source, how images are shown and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from manifests.errors import UsageError
from trainer.data.image_set import ImageSet
from trainer.data.plain_images import PlainImages
from trainer.engine.progress import ProgressLine
from trainer.engine.run_folder import RunFolder
from trainer.evaluate.features import extract, normalised
from trainer.evaluate.gather import gather_features
from trainer.evaluate.retention import Retention
from trainer.finetune.settle import Settled
from trainer.nn.precision import Precision


@dataclass(slots=True, kw_only=True)
class Shop:
    """`encoder` lies on the device and is copied, never changed; `before` is what the source gives with it."""

    settled: Settled
    encoder: nn.Module
    folder: RunFolder
    line: ProgressLine
    precision: Precision
    device: torch.device
    is_main: bool
    retention: Retention | None
    before: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.before = self.source(self.encoder)
        except FloatingPointError as error:
            raise UsageError(f"--init {self.settled.config.init}: {error}; give other weights") from error

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]  # every timm model has it

    def source(self, network: nn.Module) -> dict[str, float]:
        """Accuracies on the source; empty without one."""
        return {} if self.retention is None else self.retention.measure(partial(self._features, network))

    def accuracy(self, network: nn.Module, head: nn.Linear, part: ImageSet) -> float:
        """Share in 0..1 of a task's images that the head classifies rightly; every rank must call."""
        views = self.settled.views
        found = gather_features(partial(self._features, network), part, size=views.size, device=self.device)
        labels = torch.from_numpy(np.asarray(part.label, np.int64)).to(self.device)
        with torch.inference_mode():
            return (head(found).argmax(dim=1) == labels).double().mean().item()

    def images(self, part: ImageSet, most: int) -> Tensor:
        """The first images of a part, normalised, float [n, 3, S, S] on the device."""
        views = self.settled.views
        indices = np.arange(min(most, len(part)))
        pixels = torch.cat([batch for batch, _ in PlainImages(part, indices, size=views.size)])
        return normalised(pixels, mean=views.mean, std=views.std, device=self.device)

    def _features(self, network: nn.Module, images: Tensor) -> Tensor:
        views = self.settled.views
        return extract(network, [images], mean=views.mean, std=views.std, device=self.device)
