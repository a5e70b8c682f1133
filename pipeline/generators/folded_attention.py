"""The UNet of image variations without the work that a one-token condition makes superfluous. Exact, not approximate.

An image variation is conditioned on a single token, its CLIP embedding. Four things follow for a `UNet2DConditionModel`
(`diffusers.models.unets.unet_2d_condition`), none of which changes the function that is computed:

- softmax over one key is 1, so cross-attention is `to_out(to_v(token))`: one vector per image, the same for all pixels
  and all steps. It is computed once per batch; `norm2`, `to_q` and `to_k` vanish.
- all rows of a batch share their timestep, so the time embedding has one row, and its projection in each residual block
  is a bias of that block's first convolution, known for all steps before the first.
- up to the first cross-attention, the conditional and the unconditional half of a guided batch are the same tensor:
  it is computed once and doubled there.
- with activations in channels-last order, image and token layout are views of each other and nothing is transposed.

`why_not` says whether a network has exactly the structure this file computes; any other runs through `StockUNet`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import nn

Network = Any  # a diffusers module: what it registers in its constructor is hidden from type checkers

BLOCKS = (CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D, UNetMidBlock2DCrossAttn)


class Denoiser(Protocol):
    """A UNet that has been told its condition: `begin` once per batch, then `predict` per step."""

    def begin(self, condition: torch.Tensor, timesteps: torch.Tensor, *, guided: bool) -> None:
        """Fix the condition [B, D], the steps to come [T] (CPU) and whether there is an unconditional half."""

    def predict(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """What the UNet says to `latents` [B, C, h, w] at `timesteps[step]`.

        Guided: [2B, C, h, w], the unconditional half first, as in `StableDiffusionImageVariationPipeline.__call__`.
        """


def denoiser(unet: Network) -> Denoiser:
    """The fastest exact way to run `unet`; it takes the weights as they are now, in their present dtype and place."""
    return StockUNet(unet) if why_not(unet) else FoldedUNet(unet)


class StockUNet:
    """Any `UNet2DConditionModel`, through its own `forward`."""

    def __init__(self, unet: Network) -> None:
        self.unet = unet

    def begin(self, condition: torch.Tensor, timesteps: torch.Tensor, *, guided: bool) -> None:
        """See `Denoiser.begin`."""
        tokens = condition.unsqueeze(1)
        self.tokens = torch.cat([torch.zeros_like(tokens), tokens]) if guided else tokens
        self.timesteps = timesteps.to(condition.device)

    def predict(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """See `Denoiser.predict`."""
        rows = torch.cat([latents] * (len(self.tokens) // len(latents)))
        output: torch.Tensor = self.unet(rows, self.timesteps[step], self.tokens, return_dict=False)[0]
        return output


class FoldedUNet:
    """A `UNet2DConditionModel` for which `why_not` has nothing to say, computed as the module docstring describes."""

    def __init__(self, unet: Network) -> None:
        self.unet = unet
        self.qkv = {attn: _fused(attn) for block in _transformer_blocks(unet) for attn in [block.attn1]}
        self.steps: list[float] = []

    def begin(self, condition: torch.Tensor, timesteps: torch.Tensor, *, guided: bool) -> None:
        """See `Denoiser.begin`."""
        if guided:
            condition = torch.cat([torch.zeros_like(condition), condition])
        values = {
            block: block.attn2.to_out[0](block.attn2.to_v(condition)).unsqueeze(1)
            for block in _transformer_blocks(self.unet)
        }
        self.rows = len(condition)
        self.cross_attention: dict[Network, torch.Tensor] = values  # [rows, 1, channels] per transformer block
        if self.steps != timesteps.tolist():
            self.steps = timesteps.tolist()
            self.biases = self._time_biases(timesteps.to(condition.device))

    def _time_biases(self, timesteps: torch.Tensor) -> dict[Network, torch.Tensor]:
        """For each residual block [T, channels]: the bias of its first convolution plus the time embedding."""
        sinusoids = self.unet.time_proj(timesteps).to(self.unet.dtype)
        embedding = F.silu(self.unet.time_embedding(sinusoids))
        return {block: block.time_emb_proj(embedding) + block.conv1.bias for block in _resnets(self.unet)}

    def predict(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """See `Denoiser.predict`; follows `UNet2DConditionModel.forward` block by block."""
        unet = self.unet
        self.step = step
        x = unet.conv_in(latents.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in unet.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = self._resnet(resnet, x)
                x = self._attend(block, i, x)
                skips.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                skips.append(x)
        if unet.mid_block is not None:
            x = self._resnet(unet.mid_block.resnets[0], x)
            for i, resnet in enumerate(unet.mid_block.resnets[1:]):
                x = self._resnet(resnet, self._attend(unet.mid_block, i, x))
        for block in unet.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = torch.cat([x, self._to_rows(skips.pop(), len(x))], dim=1)
                x = self._attend(block, i, self._resnet(resnet, x))
            for upsampler in block.upsamplers or ():
                x = upsampler(x, _odd_size(x, skips[-1]))
        if unet.conv_norm_out is not None:
            x = unet.conv_act(_group_norm(unet.conv_norm_out, x))
        return self._to_rows(unet.conv_out(x), self.rows)

    @staticmethod
    def _to_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
        """Doubles what was computed once for both halves of a guided batch, where the halves begin to differ."""
        return x if len(x) == rows else torch.cat([x, x])

    def _resnet(self, block: Network, x: torch.Tensor) -> torch.Tensor:
        conv = block.conv1
        h = F.silu(_group_norm(block.norm1, x), inplace=True)
        h = F.conv2d(h, conv.weight, self.biases[block][self.step], conv.stride, conv.padding)
        h = block.conv2(F.silu(_group_norm(block.norm2, h), inplace=True))
        h += x if block.conv_shortcut is None else block.conv_shortcut(x)
        return h if block.output_scale_factor == 1 else h / block.output_scale_factor

    def _attend(self, parent: Network, index: int, x: torch.Tensor) -> torch.Tensor:
        """The `index`-th `Transformer2DModel` of a block, if it has any."""
        if not hasattr(parent, "attentions"):
            return x
        model = parent.attentions[index]
        batch, channels, height, width = x.shape
        tokens = _group_norm(model.norm, x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        tokens = _pointwise(model.proj_in, tokens)
        for block in model.transformer_blocks:
            tokens = tokens + self._self_attention(block.attn1, block.norm1(tokens))
            tokens = self._to_rows(tokens, self.rows)
            tokens += self.cross_attention[block]
            tokens += block.ff(block.norm3(tokens))
        tokens = _pointwise(model.proj_out, tokens)
        return tokens.reshape(-1, height, width, channels).permute(0, 3, 1, 2) + self._to_rows(x, self.rows)

    def _self_attention(self, attn: Network, tokens: torch.Tensor) -> torch.Tensor:
        weight, bias = self.qkv[attn]
        batch, length, _ = tokens.shape
        qkv = F.linear(tokens, weight, bias).view(batch, length, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        output: torch.Tensor = attn.to_out[0](mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


def _fused(attn: Network) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of query, key and value as one linear map."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    weight = torch.cat([layer.weight for layer in layers])
    return weight, None if attn.to_q.bias is None else torch.cat([layer.bias for layer in layers])


def _pointwise(layer: Network, tokens: torch.Tensor) -> torch.Tensor:
    """A linear layer or a 1 x 1 convolution on tokens [B, pixels, channels]."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def _group_norm(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` for x [B, C, h, w] in channels-last order.

    torch's CPU kernel for this order is several times slower on small feature maps than two passes over the pixels.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return norm(x)
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    centred = pixels - _group_means(pixels.mean(1), norm.num_groups)
    variance = _group_means((centred * centred).mean(1), norm.num_groups)
    centred *= torch.rsqrt(variance + norm.eps) * norm.weight
    centred += norm.bias
    return centred.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _group_means(values: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, C] to [B, 1, C]: each channel's value replaced by the mean of its group."""
    batch, channels = values.shape
    means = values.view(batch, groups, -1).mean(2, keepdim=True)
    return means.expand(batch, groups, channels // groups).reshape(batch, 1, channels)


def _odd_size(x: torch.Tensor, skip: torch.Tensor) -> tuple[int, int] | None:
    """The size to upsample to where doubling would not meet the skip connection, else None."""
    height, width = skip.shape[-2:]
    return None if (height, width) == (2 * x.shape[-2], 2 * x.shape[-1]) else (height, width)


def _blocks(unet: Network) -> Iterator[Network]:
    yield from unet.down_blocks
    if unet.mid_block is not None:
        yield unet.mid_block
    yield from unet.up_blocks


def _resnets(unet: Network) -> Iterator[Network]:
    for block in _blocks(unet):
        yield from block.resnets


def _transformers(unet: Network) -> Iterator[Network]:
    for block in _blocks(unet):
        yield from getattr(block, "attentions", ())


def _transformer_blocks(unet: Network) -> Iterator[Network]:
    for model in _transformers(unet):
        yield from model.transformer_blocks


def why_not(unet: Network) -> str | None:
    """Why `FoldedUNet` cannot stand for `unet`: the first thing about it that this file does not compute; else None."""
    if not _is(unet, UNet2DConditionModel):
        return f"it is a {type(unet).__name__}"
    return (
        _other_inputs(unet)
        or next((f"it has a {type(b).__name__}" for b in _blocks(unet) if type(b) not in BLOCKS), None)
        or next(filter(None, map(_odd_resnet, _resnets(unet))), None)
        or next(filter(None, map(_odd_transformer, _transformers(unet))), None)
        or (None if any(_transformers(unet)) else "it has no cross-attention")
    )


def _is(module: Network, cls: type) -> bool:
    """Exactly this class: a subclass may compute something else."""
    return type(module) is cls


def _other_inputs(unet: Network) -> str | None:
    extras = ("class_embedding", "encoder_hid_proj", "time_embed_act", "add_embedding")
    for name in extras:
        if getattr(unet, name, None) is not None:
            return f"it has a {name}"
    if any(getattr(block, "b1", None) is not None for block in unet.up_blocks):
        return "FreeU is enabled"
    if unet.config.center_input_sample or unet.config.addition_embed_type is not None:
        return "it changes its inputs"
    return None


def _odd_resnet(block: Network) -> str | None:
    plain = (
        _is(block, ResnetBlock2D)
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
    )
    return None if plain else "its residual blocks are not of the plain kind"


def _odd_transformer(model: Network) -> str | None:
    if not _is(model, Transformer2DModel) or not model.is_input_continuous:
        return "its transformers are not of the plain kind"
    for block in model.transformer_blocks:
        plain = (
            _is(block, BasicTransformerBlock)
            and block.norm_type == "layer_norm"
            and block.pos_embed is None
            and not block.only_cross_attention
            and not hasattr(block, "fuser")
            and block._chunk_size is None
            and block.attn2 is not None
            and block.attn2.is_cross_attention
            and _plain_attention(block.attn1)
            and _plain_attention(block.attn2)
        )
        if not plain:
            return "its attention is not of the plain kind"
    return None


def _plain_attention(attn: Network) -> bool:
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return (
        _is(attn, Attention)
        and type(attn.processor) in (AttnProcessor, AttnProcessor2_0)
        and all(getattr(attn, name, None) is None for name in extras)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )
