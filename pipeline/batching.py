"""How many variations go through the device at once."""

from __future__ import annotations

import torch

# Measured nowhere but on paper for GPUs: half an image of 512 px a gigabyte leaves room for a guided batch in bf16;
# where it does not, running out of memory halves the batch.
_IMAGES_512_PER_GB = 0.5
# 64 images of 32 px, 16 of 64, one of 512: measured on small networks, more no longer fits the caches. A fixed rule,
# so that CPU results repeat.
_CPU_PIXELS = 64 * 32 * 32

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def automatic_batch(device: torch.device, size: int, images: int) -> int:
    """Variations of `size` pixels a batch, for shards of up to `images` of them.

    Never decided by a timing. Batches are padded to one size: they are made as equal as the shard allows, so that 150
    images are three batches of 50 and not of 64.
    """
    batches = -(-images // _largest_batch(device, size))
    return -(-images // batches)


def _largest_batch(device: torch.device, size: int) -> int:
    """As many as are fast on a CPU; on a GPU a power of two, by its total memory."""
    pixels = size * size
    if device.type != "cuda":
        return max(1, min(64, _CPU_PIXELS // pixels))
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
    fitting = gigabytes * _IMAGES_512_PER_GB * (512 * 512) / pixels
    return int(2 ** min(8, max(0, int(fitting).bit_length() - 1)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory is full; CPU allocators raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
