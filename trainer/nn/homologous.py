"""Homologous attention (MixedAE, arXiv:2303.17152): each patch of a mixed image looks at those of its own image.

Of the patches a query may attend to as many as its own image has in the mixture: those that it scores highest, in each
head. Class tokens and registers, which are of no image, are always attended to and attend to all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from manifests.errors import UsageError


def check_blocks(vit: Any) -> None:
    """Raises `UsageError` unless the attention of all blocks is the one that `HomologousAttention` knows."""
    for block in vit.blocks:
        attention = getattr(block, "attn", None)
        if type(block) is not Block or type(attention) is not Attention or getattr(attention, "gate", None):
            raise UsageError(
                f"encoder with blocks of class {type(block).__name__} and attention of class "
                f"{type(attention).__name__}: homologous attention is made for timm's Block with Attention, ungated; "
                "choose a plain vit_* model, or method.homologous_attention=false"
            )


@dataclass(slots=True)
class HomologousAttention:
    """Runs the blocks of a ViT on G mixed images, T class tokens and registers before the L patches of each.

    `source` is int64 [G, L], the image that each patch is of; `num_keys` patches are kept for every query. `shares`
    gets, for each block, the share of the kept patches that are of the query's image, the query itself not counted.
    """

    source: Tensor
    num_keys: int
    shares: list[Tensor] = field(default_factory=list)
    _same: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._same = self.source[:, None, :, None] == self.source[:, None, None, :]  # [G, 1, L, L]
        self._same.diagonal(dim1=-2, dim2=-1).fill_(False)

    def __call__(self, block: Any, tokens: Tensor) -> Tensor:
        """The block's tokens [G, T + L, D]: timm's `Block.forward` with another attention."""
        tokens = tokens + block.drop_path1(block.ls1(self._attend(block.attn, block.norm1(tokens))))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def _attend(self, attention: Any, tokens: Tensor) -> Tensor:
        queries, keys, values = _heads(attention, tokens)
        mask = self._mask(queries.detach() * attention.scale, keys.detach())
        drop = attention.attn_drop.p if attention.training else 0.0
        # One product of queries and keys more than by hand, and still faster on CPUs, with less to keep for gradients.
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=drop)
        projected: Tensor = attention.proj_drop(attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2))))
        return projected

    def _mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What to add to the scores, [G, H, T + L, T + L]: 0, and -inf for keys to be ignored."""
        scores = queries @ keys.transpose(-2, -1)
        dropped = dropped_keys(scores, scores.shape[-1] - self.source.shape[1], self.num_keys)
        self.shares.append(self._share(dropped))
        return torch.zeros_like(scores).masked_fill_(dropped, -torch.inf)

    def _share(self, dropped: Tensor) -> Tensor:
        length = self.source.shape[1]
        patches = dropped[..., -length:, -length:]
        kept = patches.numel() - patches.count_nonzero()
        itself = patches.numel() // length - patches.diagonal(dim1=-2, dim2=-1).count_nonzero()
        own = self._same.count_nonzero() * patches.shape[1] - (patches & self._same).count_nonzero()
        return own / (kept - itself).clamp(min=1)


def _heads(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [G, H, T + L, D / H]."""
    split = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = split.unbind(0)
    return attention.q_norm(queries), attention.k_norm(keys), values


def dropped_keys(scores: Tensor, prefix: int, count: int) -> Tensor:
    """Which keys each query ignores, bool like `scores` [..., N, N]; the first `prefix` of the N tokens are no patches.

    Patches keep the `count` patches that they score highest, any that tie with the last of them, and scores that are
    not numbers, so that these show in the loss.
    """
    dropped = torch.zeros_like(scores, dtype=torch.bool)
    patches = scores[..., prefix:, prefix:]
    if count < patches.shape[-1]:
        torch.lt(patches, kth_largest(patches, count), out=dropped[..., prefix:, prefix:])
    return dropped


def kth_largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest of each row, [..., 1] of values [..., N]."""
    if values.device.type == "cpu" and values.dtype == torch.float32:  # where numpy is six times as fast as topk
        place = values.shape[-1] - count
        return torch.from_numpy(np.partition(values.numpy(), place, axis=-1)[..., place : place + 1])
    return values.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
