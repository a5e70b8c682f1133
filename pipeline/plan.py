"""Which image goes into which shard with which seed: pure functions of sorted keys, shard count and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manifests.plan import Plan


def variation_seed(run_seed: int, key: str, index: int) -> int:
    """63-bit seed of a variation's noise: a hash of (run seed, key, variation index), never of order, rank or batch."""
    digest = hashlib.blake2b(f"{run_seed}/{key}/{index}".encode(), digest_size=8, person=b"diffmix-seed").digest()
    return int.from_bytes(digest, "big") >> 1


def hash_order(keys: Sequence[str], seed: int, limit: int | None = None) -> NDArray[np.int64]:
    """Positions of the sorted `keys` in the order of a seeded hash, the first `limit` of them."""
    salt = str(seed).encode()
    digests = b"".join(
        hashlib.blake2b(key.encode(), digest_size=8, key=salt[:64], person=b"diffmix-order").digest() for key in keys
    )
    order = np.argsort(np.frombuffer(digests, dtype=">u8").astype(np.uint64), kind="stable")
    return order[:limit].astype(np.int64)


def shard_slice(plan: Plan, shard: int) -> slice:
    """Where the shard's rows lie in the hash order: shards are consecutive cuts whose sizes differ by at most one."""
    small, larger = divmod(plan.rows, plan.shards)
    start = shard * small + min(shard, larger)
    return slice(start, start + plan.shard_rows(shard))
