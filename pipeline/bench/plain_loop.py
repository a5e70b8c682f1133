"""The baseline: image variations as the DiffMix authors' `generating_images/run.py` makes them, in one process.

A loader's batches of preprocessed images, one call of the diffusers pipeline with one `torch.Generator` for the whole
run, `Image.save` of every result with Pillow's defaults (JPEG quality 75). What it does not do, and we do: seeds per
image, rows, hashes, a copy of the real image, safe writing. Its safety checker is left out unless it is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import transforms

from pipeline.generators.sd_variations import SDVariations

_SEED = 25  # the script's


class PlainLoop:
    """`pipeline` over image files in batches of `batch_size`, with the generator's scheduler, steps and guidance."""

    def __init__(self, pipeline: Any, like: SDVariations, batch_size: int) -> None:
        self.pipeline = pipeline
        self.pipeline.scheduler = type(like.scheduler).from_config(like.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.batch_size = batch_size
        self._settings = {
            "num_inference_steps": like.steps,
            "guidance_scale": like.guidance_scale,
            "height": like.size,
            "width": like.size,
        }
        self._preprocess = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Resize(
                    (like.side, like.side), interpolation=transforms.InterpolationMode.BICUBIC, antialias=False
                ),
                transforms.Normalize(like.mean.flatten().tolist(), like.std.flatten().tolist()),
            ]
        )

    def run(self, files: Sequence[Path], out: Path) -> None:
        """Make one variation of each file, as a JPEG of the same stem in `out`."""
        out.mkdir(parents=True)
        generator = torch.Generator(self.pipeline.device).manual_seed(_SEED)
        for batch in _batches(files, self.batch_size):
            images = self.pipeline(self.inputs(batch), generator=generator, **self._settings).images
            for file, image in zip(batch, images, strict=True):
                image.save(out / f"{file.stem}.jpg")

    def inputs(self, files: Sequence[Path]) -> torch.Tensor:
        """Files as the image encoder's input."""
        images = [self._preprocess(Image.open(file).convert("RGB")) for file in files]
        return torch.stack(images).to(self.pipeline.device, self.pipeline.unet.dtype)

    def pictures(self, inputs: torch.Tensor, latents: torch.Tensor) -> list[Image.Image]:
        """The pipeline's pictures from given latents."""
        images: list[Image.Image] = self.pipeline(
            inputs, latents=latents.to(self.pipeline.unet.dtype), **self._settings
        ).images
        return images


def _batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]
