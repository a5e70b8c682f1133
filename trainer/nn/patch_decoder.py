"""Decoder of a masked autoencoder (He et al. 2021, section 3): pixels of the patches that the encoder did not see."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from trainer.nn.masked_vit import sincos_positions


class PatchDecoder(nn.Module):
    """Transformer blocks over what the encoder says of the visible patches, and a mask token for each hidden one.

    Patches come in any order and are told apart by fixed sin-cos positions alone; class tokens have none.
    """

    positions: Tensor

    def __init__(
        self, in_dim: int, num_pixels: int, grid: tuple[int, int], *, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, num_pixels)
        self.register_buffer("positions", sincos_positions(grid, dim), persistent=False)
        self.apply(_xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, prefix: Tensor, visible: Tensor, order: Tensor) -> Tensor:
        """Pixels [N, L - k, P] of the hidden patches; of all of them, [N, L, P], where none is hidden.

        `order` is int64 [N, L], the numbers of all patches, those of `visible` [N, k, D] first; `prefix` is [N, T, D],
        what the encoder says of class tokens and registers.
        """
        count = visible.shape[1]
        positions = self.positions[order]
        masked = self.mask_token + positions[:, count:]
        tokens = [self.embed(prefix), self.embed(visible) + positions[:, :count], masked]
        predicted = masked.shape[1] or count
        return self.predict(self.norm(self.blocks(torch.cat(tokens, dim=1))[:, -predicted:]))


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
