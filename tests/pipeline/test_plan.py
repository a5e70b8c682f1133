"""The plan as arithmetic: a permutation of the keys, even cuts, seeds that depend on nothing but their row."""

import hashlib
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manifests.plan import Plan
from pipeline.plan import hash_order, shard_slice, variation_seed

keys = st.sets(st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True), min_size=1, max_size=200).map(sorted)


def plan_of(rows, shards):
    return Plan(
        source={}, generator=None, seed=0, variations=1, shards=shards, rows=rows, limit=None,
        labelled=False, store_real=None, quality=90, max_pixels=1,
    )  # fmt: skip


@given(keys, st.integers(-(2**63), 2**63), st.integers(1, 300))
def test_shards_are_an_even_cut_of_a_permutation(names, seed, shards):
    plan = plan_of(len(names), min(shards, len(names)))
    order = hash_order(names, seed)
    cuts = [order[shard_slice(plan, shard)] for shard in range(plan.shards)]
    assert sorted(np.concatenate(cuts).tolist()) == list(range(len(names)))
    sizes = [len(cut) for cut in cuts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [plan.shard_rows(shard) for shard in range(plan.shards)]
    assert max(sizes) == plan.largest_shard


@given(keys, st.integers(0, 5), st.integers(1, 50))
def test_a_limit_takes_the_first_of_the_same_order(names, seed, limit):
    assert hash_order(names, seed, limit).tolist() == hash_order(names, seed).tolist()[:limit]


@given(keys, st.integers(0, 5))
def test_order_of_two_keys_does_not_depend_on_the_others(names, seed):
    whole = [names[position] for position in hash_order(names, seed)]
    half = names[::2]
    assert [half[position] for position in hash_order(half, seed)] == [name for name in whole if name in set(half)]


def test_another_seed_gives_another_order():
    names = [f"k{number:04d}" for number in range(100)]
    assert hash_order(names, 0).tolist() != hash_order(names, 1).tolist()


def test_seeds_are_63_bits_and_unique():
    seeds = {variation_seed(0, f"k{key}", index) for key in range(20_000) for index in range(3)}
    assert len(seeds) == 60_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_a_seed_is_the_documented_hash():
    digest = hashlib.blake2b(b"7/some-key/2", digest_size=8, person=b"diffmix-seed").digest()
    assert variation_seed(7, "some-key", 2) == int.from_bytes(digest, "big") // 2


def test_classes_are_spread_over_shards():
    names = [f"{'a' if number < 500 else 'b'}{number:04d}" for number in range(1000)]
    order = hash_order(names, 0)
    plan = SimpleNamespace(rows=1000, shards=10, shard_rows=plan_of(1000, 10).shard_rows)
    shares = [
        np.mean([names[position][0] == "a" for position in order[shard_slice(plan, shard)]]) for shard in range(10)
    ]
    # 100 draws without replacement: a standard deviation of five points, so that 25 is out of reach of chance
    assert all(0.25 < share < 0.75 for share in shares)
