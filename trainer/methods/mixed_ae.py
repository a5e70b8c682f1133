"""MixedAE (Chen et al. 2023, arXiv:2303.17152): MAE whose visible patches are those of several images in one mixture.

Each of `group_size` images gives as many patches to the mixture, which is encoded whole; each image is decoded from its
own patches, as in MAE. Mixed naively, the pixels of one image tell of those of the others; the encoder must find out
which patches belong together: by homologous attention, the homologous contrastive loss and segment embeddings.

There is no official code. Chosen here: groups are neighbours in the order of samples, the class token of a mixture
goes to the decoder of each of its images, attention is homologous in training only, and the contrastive loss compares
the encoder's last, normalised tokens without a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import UsageError
from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Progress, StepOutput, require
from trainer.methods.mae import MAE, DecoderConfig, Encoded, random_orders
from trainer.nn.homologous import HomologousAttention, check_blocks
from trainer.nn.masked_vit import embed, patchify, run_blocks, take, unpatchify
from trainer.nn.precision import full_precision
from trainer.nn.statistics import feature_std

SegmentEmbedding = Literal["none", "input", "output"]
_PLACES: tuple[SegmentEmbedding, ...] = ("none", "input", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedAEConfig(DecoderConfig):
    """MixedAE's settings. Each part can be switched off; without `mixing` it is MAE at the same share of patches."""

    group_size: int = 4  # images in one mixture: the paper's 1 / r
    mixing: bool = True
    homologous_attention: bool = True
    contrastive_weight: float = 0.1  # of the homologous contrastive loss; 0: none
    contrastive_temperature: float = 0.25
    segment_embedding: SegmentEmbedding = "input"  # added to the patches where they enter the encoder, or leave it

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        require(self.group_size > 0, "group_size", self.group_size, "1 or more")
        require(self.contrastive_weight >= 0, "contrastive_weight", self.contrastive_weight, "0 or more")
        temperature = self.contrastive_temperature
        require(temperature > 0, "contrastive_temperature", temperature, "above 0")
        known = self.segment_embedding in _PLACES
        require(known, "segment_embedding", self.segment_embedding, " or ".join(_PLACES))


class Mixture(NamedTuple):
    """Where G mixtures of g images each take their L patches from.

    `order` is int64 [G, L]: L / g places for the first image of the group, as many for the second, and so on. `source`
    is int64 [G, L], the number within the group of the image at each place.
    """

    order: Tensor
    source: Tensor


def random_mixture(groups: int, group_size: int, length: int, seed: int, device: torch.device) -> Mixture:
    """Every image of a group gets equally many places, at random, for this rank's groups; see `random_orders`."""
    order = random_orders(groups, length, seed, device)
    owners = torch.arange(length, device=device) // (length // group_size)
    return Mixture(order, torch.empty_like(order).scatter_(1, order, owners.expand_as(order)))


def mix(pixels: Tensor, source: Tensor) -> Tensor:
    """Patches [G, L, P] of the mixtures, of the patches [G * g, L, P] of all images, group after group."""
    groups, length = source.shape
    by_group = pixels.unflatten(0, (groups, -1))  # [G, g, L, P]
    return by_group.gather(1, source.view(groups, 1, length, 1).expand(-1, -1, -1, pixels.shape[-1])).squeeze(1)


def homologous_contrast(patches: Tensor, group_size: int, temperature: float) -> Tensor:
    """Supervised contrastive loss within each mixture: patches of one image attract, all others repel; in float32.

    `patches` is float [G, L, D], those of the first image first, then those of the second, and so on.
    """
    with full_precision(patches):
        values = F.normalize(patches.float(), dim=-1)
        logits = values @ values.transpose(1, 2) / temperature
        others = logits.diagonal_scatter(torch.full_like(logits[:, 0], -torch.inf), dim1=1, dim2=2)
        own = values.unflatten(1, (group_size, -1))  # [G, g, L / g, D]
        share = own.shape[2]
        together = (own * own.sum(dim=2, keepdim=True)).sum(dim=-1) - own.square().sum(dim=-1)
        return others.logsumexp(dim=-1).mean() - together.mean() / ((share - 1) * temperature)


class MixedAE(MAE):
    """MAE's encoder and decoder, and a segment embedding for each image of a group."""

    Config: ClassVar[type] = MixedAEConfig

    def __init__(self, make_encoder: MakeEncoder, config: MixedAEConfig) -> None:
        super().__init__(make_encoder, config)
        self._check_patches()
        if config.mixing:
            self._check_size()
        if config.mixing and config.homologous_attention:
            check_blocks(self.backbone)
        self.segments: nn.Parameter | None = None
        if config.mixing and config.segment_embedding != "none":
            width: Any = self.backbone.embed_dim
            self.segments = nn.Parameter(torch.empty(config.group_size, width))
            nn.init.normal_(self.segments, std=0.02)

    def _check_patches(self) -> None:
        size, count = self.config.group_size, self.num_patches
        fair = f"a number that divides the {count} patches of an image"
        require(count % size == 0, "group_size", size, fair)
        alone = self.config.contrastive_weight > 0 and count // size < 2
        require(not alone, "group_size", size, f"at most {count // 2}, so that each image has two patches to compare")

    def _check_size(self) -> None:
        """Mixtures are put together of whole patches; MAE cuts off what is left over at the borders."""
        vit: Any = self.backbone
        sides: tuple[int, int] = vit.patch_embed.img_size
        if any(side % patch for side, patch in zip(sides, self.patch, strict=True)):
            raise UsageError(
                f"images of {' x '.join(map(str, sides))} px are no whole patches of {self.patch[0]} x {self.patch[1]} "
                "px: choose another views.size or encoder.args.patch_size"
            )

    @property
    def num_visible(self) -> int:
        share = self.num_patches // self.config.group_size
        return share if self.config.mixing else min(share, self.num_patches - 1)

    def check_batch(self, images: int) -> None:
        size = self.config.group_size
        if self.config.mixing and images % size:
            raise UsageError(
                f"{images} images, the micro-batch of a process, cannot be cut into groups of {size} "
                f"(method.group_size): --batch-size must be a multiple of {size} x processes x accumulation steps"
            )

    def notes(self, progress: Progress) -> list[str]:
        return (
            [] if self.config.mixing else ["method.mixing=false: this is MAE, and the other parts of MixedAE are off"]
        )

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        if not self.config.mixing:
            return super().forward(views, progress)
        images, size = views.crops[0], self.config.group_size
        mixture = random_mixture(len(images) // size, size, self.num_patches, progress.seed, images.device)
        prefix, patches, logs = self._encode_mixed(images, mixture)
        loss = self.reconstruct(images, self._by_image(prefix, patches, mixture.order))
        logs |= {"reconstruction": loss.detach(), "feature_std": feature_std(patches.mean(dim=1))}
        if self.config.contrastive_weight:
            contrast = homologous_contrast(patches, size, self.config.contrastive_temperature)
            loss = loss + self.config.contrastive_weight * contrast
            logs["contrast"] = contrast.detach()
        return StepOutput(loss, logs)

    def _encode_mixed(self, images: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Class tokens [G, T, D] and patches [G, L, D] of the mixtures, these image after image, and what to log."""
        vit: Any = self.backbone
        mixed = mix(patchify(images, self.patch), mixture.source)
        tokens = embed(vit, unpatchify(mixed, vit.patch_embed.grid_size, self.patch))
        if self.segments is not None and self.config.segment_embedding == "input":
            tokens = tokens + F.pad(self.segments[mixture.source], (0, 0, vit.num_prefix_tokens, 0))
        run = None
        if self.training and self.config.homologous_attention:
            run = HomologousAttention(mixture.source, self.num_visible)
        prefix, patches = run_blocks(vit, tokens, run).tensor_split([vit.num_prefix_tokens], dim=1)
        return prefix, take(patches, mixture.order), {} if run is None else _shares(run.shares)

    def _by_image(self, prefix: Tensor, patches: Tensor, order: Tensor) -> Encoded:
        """What the decoder gets of each image: its own patches of [G, L, D], and its mixture's class tokens."""
        size, visible = self.config.group_size, self.num_visible
        own = patches.unflatten(1, (size, visible))  # [G, g, L / g, D]
        if self.segments is not None and self.config.segment_embedding == "output":
            own = own + self.segments[:, None]
        orders = torch.stack([order.roll(-number * visible, dims=1) for number in range(size)], dim=1)
        return Encoded(prefix.repeat_interleave(size, dim=0), own.flatten(0, 1), orders.flatten(0, 1))


def _shares(shares: list[Tensor]) -> dict[str, Tensor]:
    """Share of the kept keys that are of the query's image: over all blocks, in the first and in the last one."""
    return {
        "homologous_keys": torch.stack(shares).mean(),
        "homologous_keys_first": shares[0],
        "homologous_keys_last": shares[-1],
    }
