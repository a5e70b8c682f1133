"""Homologous attention against a naive one; with all keys it is timm's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import ParallelScalingBlock

from manifests.errors import UsageError
from tests.trainer.methods.small import tiny_vit
from trainer.nn.homologous import HomologousAttention, check_blocks, dropped_keys, kth_largest


def _source(groups=2, size=4, length=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    owners = torch.arange(length) // (length // size)
    return torch.stack([owners[torch.randperm(length, generator=draw)] for _ in range(groups)])


def _block(**arguments):
    torch.manual_seed(0)
    vit = tiny_vit(**arguments).double()
    check_blocks(vit)
    return vit.blocks[0], torch.randn(2, 16 + vit.num_prefix_tokens, 32).double()


def naive_attention(attention, tokens, count, prefix):
    """Query after query: scores, -inf for all patches but the highest, softmax; also the patches kept."""
    groups, length, width = tokens.shape
    size, rows, kept = width // attention.num_heads, [], {}
    for group in range(groups):
        queries, keys, values = attention.qkv(tokens[group]).split(width, dim=-1)
        for query in range(length):
            parts = []
            for head in range(attention.num_heads):
                own = slice(head * size, (head + 1) * size)
                scores = keys[:, own] @ queries[query, own] / math.sqrt(size)
                highest = sorted(range(prefix, length), key=scores.tolist().__getitem__, reverse=True)
                if query >= prefix:
                    kept[group, head, query - prefix] = [key - prefix for key in highest[:count]]
                    scores = scores.clone()
                    scores[highest[count:]] = -torch.inf
                parts.append(scores.exp() / scores.exp().sum() @ values[:, own])
            rows.append(torch.cat(parts))
    return attention.proj(torch.stack(rows).view_as(tokens)), kept


@pytest.mark.parametrize("arguments", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_block_and_its_gradient_are_the_naive_ones(arguments):
    block, tokens = _block(**arguments)
    prefix = tokens.shape[1] - 16
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    run = HomologousAttention(_source(), 4)
    output = run(block, ours)
    attended, kept = naive_attention(block.attn, block.norm1(theirs), 4, prefix)
    middle = theirs + attended
    expected = middle + block.mlp(block.norm2(middle))
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    pairs = [(group, query, key) for (group, _, query), keys in kept.items() for key in keys if key != query]
    same = [run.source[group, query] == run.source[group, key] for group, query, key in pairs]
    assert run.shares[0].item() == pytest.approx(sum(same).item() / len(same))


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True, "init_values": 0.1, "reg_tokens": 1}])
def test_with_all_keys_it_is_timms_block(arguments):
    block, tokens = _block(**arguments)
    run = HomologousAttention(_source(), 16)
    torch.testing.assert_close(run(block, tokens), block(tokens))
    assert run.shares[0].item() == pytest.approx(3 / 15)  # three of the fifteen other patches


def test_share_of_keys_that_recognise_their_own():
    block, tokens = _block()
    source = _source()
    owner = torch.nn.functional.one_hot(source, 4).double() @ torch.randn(4, 32).double()
    tokens[:, 1:] = 0.01 * tokens[:, 1:] + owner
    with torch.no_grad():  # queries are keys: who is like me?
        block.attn.qkv.weight[:32] = block.attn.qkv.weight[32:64] = torch.eye(32)
        block.attn.qkv.bias.zero_()
    run = HomologousAttention(source, 4)
    run(block, tokens)
    assert run.shares[0].item() == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(
    prefix=st.integers(0, 2),
    length=st.integers(1, 12),
    count=st.integers(1, 12),
    seed=st.integers(0, 999),
    bf16=st.booleans(),
)
def test_keys_kept(prefix, length, count, seed, bf16):
    size = prefix + length
    order = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)).argsort(-1).float()
    scores = order.bfloat16() if bf16 else order  # whole numbers: no ties in either format
    kept = ~dropped_keys(scores, prefix, count)
    assert kept[..., :prefix].all() and kept[..., :prefix, :].all()
    patches = kept[..., prefix:, prefix:]
    assert (patches.sum(-1) == min(count, length)).all()
    lowest_kept = scores[..., prefix:, prefix:].masked_fill(~patches, torch.inf).amin(-1)
    highest_dropped = scores[..., prefix:, prefix:].masked_fill(patches, -torch.inf).amax(-1)
    assert (lowest_kept > highest_dropped).all()


def test_scores_that_are_not_numbers_are_kept():
    scores = torch.zeros(1, 1, 6, 6)
    scores[0, 0, 3] = torch.nan
    assert not dropped_keys(scores, 1, 2)[0, 0, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kth_largest(dtype):
    values = torch.tensor([[3.0, 1, 2, 5], [0, -1, -2, -3]], dtype=dtype)
    assert kth_largest(values, 2).tolist() == [[3], [-1]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"block_fn": ParallelScalingBlock}, "class ParallelScalingBlock"),
        ({"attn_layer": "diff"}, "class DiffAttention"),
    ],
)
def test_blocks_of_another_kind_are_refused(arguments, says):
    with pytest.raises(UsageError, match=f"{says}.*homologous_attention=false"):
        check_blocks(tiny_vit(**arguments))
