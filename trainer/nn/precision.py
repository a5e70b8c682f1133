"""Which number format, memory layout and attention a device is fast with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifests.errors import UsageError

EncoderKind = Literal["vit", "convnet"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How the networks compute; losses and optimisers stay in float32. `reason` is for people."""

    dtype: torch.dtype
    channels_last: bool
    fused_attention: bool
    reason: str


def choose(
    device: torch.device, encoder_kind: EncoderKind, asked: str = "auto", *, fast_bf16: bool | None = None
) -> Precision:
    """The precision for a device: what was `asked` (`fp32`, `bf16`, `fp16`); `auto` is fp32 on CPU and bf16 elsewhere.

    `fast_bf16` says whether the device multiplies bf16 in hardware; None looks. Raises `UsageError` for an unknown
    name and for fp16 on CPU.
    """
    fast = has_fast_bf16(device) if fast_bf16 is None else fast_bf16
    name, reason = _default(device, fast) if asked == "auto" else _asked(device, asked, fast)
    dtype = _DTYPES[name]
    return Precision(
        dtype=dtype,
        channels_last=encoder_kind == "convnet",  # 2-8 % in fp32; bf16 convolutions are slow without it
        # The backward pass of the CPU's fused attention is several times slower in bf16 than in fp32.
        fused_attention=device.type != "cpu" or dtype == torch.float32,
        reason=reason,
    )


def _default(device: torch.device, fast: bool) -> tuple[str, str]:
    if device.type == "cpu":
        return "fp32", "fp32: the default on CPU"
    if not fast:
        return "fp32", f"fp32: this {device.type} device has no bf16; `--precision fp16` is faster but may overflow"
    return "bf16", f"bf16: the default on {device.type}"


def _asked(device: torch.device, asked: str, fast: bool) -> tuple[str, str]:
    if asked not in _DTYPES:
        raise UsageError(f"--precision {asked} is not known; choose auto, {', '.join(_DTYPES)}")
    if asked == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 does not train on CPU; choose fp32, or bf16 on a CPU with AMX")
    if asked == "bf16" and not fast:
        lacks = "CPU has no AMX" if device.type == "cpu" else f"{device.type} device has no bf16"
        return asked, f"bf16 as asked, but this {lacks}: expect it to be several times slower than fp32"
    return asked, f"{asked}: as asked"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: AMX on CPU; unknown kinds of device count as able."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


def prepare(network: nn.Module, precision: Precision) -> None:
    """Lays out the weights, and has timm's blocks spell out attention where that is faster; no value changes."""
    if precision.channels_last:
        network.to(memory_format=torch.channels_last)
    modules: Iterable[Any] = network.modules()
    for module in modules:
        if not precision.fused_attention and hasattr(module, "fused_attn"):
            module.fused_attn = False


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which operations on the device of `values` keep the dtype of their inputs."""
    return torch.autocast(values.device.type, enabled=False)
