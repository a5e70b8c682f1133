"""BatchNorm over the batches of all ranks."""

from __future__ import annotations

from typing import TypeVar

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def synchronised(network: Network) -> Network:
    """The network with SyncBatchNorm, on GPUs only, for every BatchNorm; weights and names stay.

    Not torch's own conversion: it drops the activations that many of timm's BatchNorms contain.
    """
    converted: Network = convert_sync_batchnorm(network)
    return converted
