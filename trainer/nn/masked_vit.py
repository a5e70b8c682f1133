"""A timm vision transformer that sees some of its patches only (masked autoencoders, He et al. 2021, arXiv:2111.06377).

The encoder itself is not changed: its own layers are called, with patches left out between positions and blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from manifests.errors import UsageError

_POOLINGS = ("token", "avg", "avgmax", "max")

RunBlock = Callable[[nn.Module, Tensor], Tensor]  # a block and its tokens [N, T, D] to those behind it


def masked_vit(encoder: nn.Module) -> Any:
    """The encoder, if it is one that can leave patches out; else `UsageError` with its class name."""
    name = type(encoder).__name__
    if not isinstance(encoder, VisionTransformer) or _changes(encoder, "_pos_embed", "forward_features"):
        raise UsageError(
            f"encoder of class {name}: this method leaves patches out or mixes them, which it can of timm's "
            "VisionTransformer only; choose a vit_* model, such as --encoder vit_tiny_patch16_224"
        )
    vit: Any = encoder
    if type(vit.patch_embed) is not PatchEmbed or vit.patch_embed.dynamic_img_pad:
        raise UsageError(
            f"encoder of class {name}: its {type(vit.patch_embed).__name__} makes patches that overlap or are padded; "
            "choose one that only cuts, without dynamic_img_pad, such as --encoder vit_tiny_patch16_224"
        )
    if not isinstance(vit.patch_drop, nn.Identity):
        raise UsageError("encoder.args.patch_drop_rate: the method itself says which patches are left out; give 0")
    if vit.attn_pool is not None or vit.global_pool not in _POOLINGS:
        raise UsageError(
            f"encoder.args.global_pool is {vit.global_pool!r}, which has layers that this method does not train; "
            f"choose one of {', '.join(_POOLINGS)}"
        )
    return vit


def _changes(encoder: nn.Module, *parts: str) -> bool:
    return any(getattr(type(encoder), part) is not getattr(VisionTransformer, part) for part in parts)


def start_positions(vit: Any) -> None:
    """Fill the learned positions with sines and cosines, which the authors' encoder has fixed: better than noise."""
    if vit.pos_embed is None:
        return
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, prefix:] = sincos_positions(vit.patch_embed.grid_size, vit.embed_dim)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of row and column, float [H * W, dim]; `dim` must be a multiple of 4."""
    return build_sincos2d_pos_embed(list(grid), dim=dim, interleave_sin_cos=False)


def embed(vit: Any, images: Tensor) -> Tensor:
    """Tokens [N, T + L, D] with positions: T class tokens and registers, then L patches of images [N, 3, S, S]."""
    return vit._pos_embed(vit.patch_embed(images))


def keep(vit: Any, tokens: Tensor, patches: Tensor) -> Tensor:
    """The tokens [N, T + k, D] of the patches int64 [N, k] alone, in that order, behind all class tokens."""
    prefix, rest = tokens.split([vit.num_prefix_tokens, tokens.shape[1] - vit.num_prefix_tokens], dim=1)
    return torch.cat([prefix, take(rest, patches)], dim=1)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Rows [N, k, D] of values [N, L, D] at places int64 [N, k]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def run_blocks(vit: Any, tokens: Tensor, run: RunBlock | None = None) -> Tensor:
    """What the blocks and the encoder's norm make of tokens [N, T, D].

    Models that pool patches have their norm behind the pooling (`fc_norm`). It is applied to every token here, so that
    it is trained, and what follows sees normalised tokens whichever way the encoder pools.
    """
    tokens = vit.norm_pre(tokens)
    for block in vit.blocks:
        tokens = block(tokens) if run is None else run(block, tokens)
    return vit.fc_norm(vit.norm(tokens))


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels [N, L, P] of the L patches, row by row, of images [N, 3, H, W]; P = height x width x 3, colours last."""
    rows, columns = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    cut = images[..., : rows * patch[0], : columns * patch[1]]
    boxes = cut.unflatten(3, (columns, patch[1])).unflatten(2, (rows, patch[0]))  # [N, 3, rows, p, columns, q]
    return boxes.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Images [N, 3, H, W] of the pixels of their patches: the inverse of `patchify`."""
    boxes: Any = pixels.unflatten(2, (*patch, 3)).unflatten(1, grid)  # [N, rows, columns, p, q, 3]
    return boxes.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
