"""MAE (He et al. 2021, arXiv:2111.06377): the pixels of most patches, from the few that the encoder sees.

Unlike in the authors' code the encoder's positions are learned, as timm's are, from the same sines and cosines on; and
the decoder predicts hidden patches only, the loss being of no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Method, Progress, StepOutput, require
from trainer.nn import collectives
from trainer.nn.masked_vit import embed, keep, masked_vit, patchify, run_blocks, start_positions, take
from trainer.nn.patch_decoder import PatchDecoder
from trainer.nn.precision import full_precision
from trainer.nn.statistics import feature_std


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The decoder, which is thrown away in the end, and what it predicts; the defaults are the authors'."""

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normalize_targets: bool = True  # each patch to mean 0 and deviation 1

    def __post_init__(self) -> None:
        for name in ("decoder_depth", "decoder_heads"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        divides = self.decoder_dim > 0 and self.decoder_dim % 4 == 0 and self.decoder_dim % self.decoder_heads == 0
        allowed = f"a multiple of 4 and of decoder_heads, {self.decoder_heads}"
        require(divides, "decoder_dim", self.decoder_dim, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class MAEConfig(DecoderConfig):
    """MAE's settings; the defaults are those of the paper's ImageNet runs."""

    mask_ratio: float = 0.75  # share of the patches that are hidden

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "above 0 and below 1")


class Encoded(NamedTuple):
    """What the encoder says of N images: class tokens and registers [N, T, D], visible patches [N, k, D] and `order`.

    `order` is int64 [N, L], the numbers of all patches of each image, the visible ones first.
    """

    prefix: Tensor
    visible: Tensor
    order: Tensor

    @property
    def predicted(self) -> Tensor:
        """Numbers of the patches that the decoder predicts, int64 [N, M]: the hidden ones, or all if none is hidden."""
        return self.order[:, self.visible.shape[1] % self.order.shape[1] :]


def random_orders(count: int, length: int, seed: int, device: torch.device) -> Tensor:
    """Random orders of 0 to `length` - 1, int64 [count, length], for this rank's part of `count` times ranks many.

    Drawn on the CPU for all ranks, so that they depend neither on the number of ranks nor on the device.
    """
    noise = torch.rand(count * collectives.world_size(), length, generator=torch.Generator().manual_seed(seed))
    own = noise[collectives.rank() * count :][:count].argsort(dim=1, stable=True)
    pinned = own.pin_memory() if device.type == "cuda" else own  # or the host would wait for the device
    return pinned.to(device, non_blocking=True)


def normalized(pixels: Tensor) -> Tensor:
    """Patches [..., P] of mean 0 and deviation 1, the variance with Bessel's correction as in the authors' code."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(predicted: Tensor, pixels: Tensor, *, normalize: bool) -> Tensor:
    """Mean squared error of predictions [N, M, P] of the hidden patches' pixels [N, M, P], in float32."""
    with full_precision(predicted):
        targets = normalized(pixels.float()) if normalize else pixels.float()
        return (predicted.float() - targets).square().mean()


class MAE(Method):
    """An encoder of the visible patches and a decoder of the hidden ones."""

    Config: ClassVar[type] = MAEConfig
    num_crops = 1
    backbone: nn.Module

    def __init__(self, make_encoder: MakeEncoder, config: Any) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        self.backbone = vit = masked_vit(make_encoder())
        start_positions(vit)
        self.patch: tuple[int, int] = vit.patch_embed.patch_size
        self.num_patches = vit.patch_embed.num_patches
        self.decoder = PatchDecoder(
            vit.embed_dim,
            3 * self.patch[0] * self.patch[1],
            vit.patch_embed.grid_size,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )

    @property
    def encoder(self) -> nn.Module:
        return self.backbone

    @property
    def num_visible(self) -> int:
        """Patches of an image that the encoder sees: at least one, and not all."""
        visible = int(self.num_patches * (1 - self.config.mask_ratio))
        return min(max(visible, 1), self.num_patches - 1)

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        images = views.crops[0]
        encoded = self.encode(images, progress.seed)
        return StepOutput(self.reconstruct(images, encoded), {"feature_std": feature_std(encoded.visible.mean(1))})

    def encode(self, images: Tensor, seed: int) -> Encoded:
        """What the encoder says of a random part of the patches of images [B, 3, S, S]."""
        vit: Any = self.backbone
        order = random_orders(len(images), self.num_patches, seed, images.device)
        tokens = run_blocks(vit, keep(vit, embed(vit, images), order[:, : self.num_visible]))
        return Encoded(tokens[:, : -self.num_visible], tokens[:, -self.num_visible :], order)

    def reconstruct(self, images: Tensor, encoded: Encoded) -> Tensor:
        """The loss of what the decoder predicts of the hidden patches."""
        predicted = self.decoder(*encoded)
        pixels = take(patchify(images, self.patch), encoded.predicted)
        return reconstruction_loss(predicted, pixels, normalize=self.config.normalize_targets)
