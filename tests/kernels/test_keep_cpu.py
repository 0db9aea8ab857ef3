"""Kept tokens in the paged cache: compiled code against torch, torch against the definition."""

from __future__ import annotations

import pytest
import torch

from pte_vllm.kernels import keep_torch, native
from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable
from pte_vllm.kernels.keep_cpu import can_keep, expected_scores_cpu, put_cpu, take_cpu
from pte_vllm.method import keep
from pte_vllm.method.rope import rotate

LAYERS, HEADS, BLOCKS, PROBES = 3, 2, 19, 21


@pytest.mark.parametrize(
    ("block_size", "dim", "rotary", "num_candidates", "num_newest"),
    [(32, 64, 64, 2, 1), (16, 80, 32, 5, 3), (8, 48, 0, 3, 2), (17, 32, 32, 2, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_copies(
    block_size: int, dim: int, rotary: int, num_candidates: int, num_newest: int, dtype: torch.dtype
) -> None:
    library = native.load()
    g = torch.Generator().manual_seed(dim)
    caches = [
        torch.randn(BLOCKS, HEADS, block_size, 2 * dim, generator=g).to(dtype)
        for _ in range(LAYERS)
    ]
    sequences = 2
    used = torch.randperm(BLOCKS, generator=g)
    per_sequence = num_candidates + num_newest
    ids = used[: sequences * per_sequence].view(sequences, per_sequence)
    for cache in caches:  # whatever else is in the pool must not matter
        cache[used[sequences * per_sequence :]] = float("nan")
    candidates, newest = ids[:, :num_candidates], ids[:, num_candidates:]
    # Any order of a head's numbers within a block.
    order = torch.randperm(2 * block_size * dim, generator=g).view(2, block_size, dim)
    layout = BlockLayout(key_index=order[0], value_index=order[1])
    angle = torch.rand(300, max(rotary // 2, 1), generator=g) * 6
    rope = RopeTable(cos=angle.cos(), sin=angle.sin()) if rotary else None
    queries = 2 * torch.randn(LAYERS, HEADS, PROBES, dim, generator=g)
    probed = keep_torch.ProbedCache(queries=queries, rope=rope, scale=dim**-0.5)
    fold_at = torch.tensor([120, 250])  # some probes would stand past the table's end

    wanted = keep_torch.expected_scores(caches, layout, probed, candidates, newest, fold_at)
    assert wanted.shape == (LAYERS, sequences, HEADS, num_candidates * block_size)
    for layer, s, h in ((0, 0, 0), (2, 1, 1)):
        flat = caches[layer][:, h].flatten(1)
        keys, values = (flat[candidates[s]][:, index].flatten(0, 1).float() for index in order)
        peers = flat[newest[s]][:, order[0]].flatten(0, 1).float()
        turned = queries[layer, h]
        if rope is not None:
            at = keep.probe_positions(fold_at[s : s + 1], PROBES, 300)[0]
            turned = rotate(turned, rope.cos[at], rope.sin[at])
        one = keep.expected_scores(turned, keys, values, peers, dim**-0.5)
        assert torch.allclose(wanted[layer, s, h], one, rtol=1e-5, atol=1e-7)

    assert can_keep(caches)
    args = caches, layout, probed
    found = expected_scores_cpu(library, *args, candidates, newest, fold_at)
    assert torch.allclose(found, wanted, rtol=3e-5, atol=1e-7)
    alone = expected_scores_cpu(library, *args, candidates[1:], newest[1:], fold_at[1:])
    assert torch.equal(alone, found[:, 1:])  # the same bits, whoever is beside

    kept = keep.best(found, 2 * block_size - block_size // 2)[..., :block_size]
    taken = keep_torch.take(caches, layout, candidates, kept)
    assert torch.equal(take_cpu(library, caches, layout, candidates, kept), taken)
    own = used[-sequences:].view(sequences, 1)
    other = [cache.clone() for cache in caches]
    keep_torch.put(caches, layout, own, taken)
    put_cpu(library, other, layout, own, taken)
    assert all(torch.equal(a[ids], b[ids]) for a, b in zip(caches, other, strict=True))
    assert all(torch.equal(a[own], b[own]) for a, b in zip(caches, other, strict=True))
    for layer, s, h, i in ((0, 0, 0, 0), (2, 1, 1, block_size - 1)):
        place = int(kept[layer, s, h, i])
        source = caches[layer][candidates[s, place // block_size], h].flatten()
        target = caches[layer][own[s, 0], h].flatten()
        for index in order:
            assert torch.equal(target[index[i]], source[index[place % block_size]])


def test_extreme_logits_are_shares_still() -> None:
    """What attends to one candidate alone gives it all, and the others nothing."""
    library = native.load()
    cache = torch.zeros(2, 1, 16, 32)
    layout_cells = torch.arange(16 * 32).view(16, 32)
    layout = BlockLayout(key_index=layout_cells[:, :16], value_index=layout_cells[:, 16:])
    cache[0, 0, 3, :16], cache[0, 0, :, 16] = 1000.0, 2.0
    queries = torch.full((1, 1, 2, 16), 10.0)
    probed = keep_torch.ProbedCache(queries=queries, rope=None, scale=1.0)
    ids = torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([50])
    found = expected_scores_cpu(library, [cache], layout, probed, *ids)[0, 0, 0]
    wanted = torch.zeros(16)
    wanted[3] = 2.0
    assert torch.equal(found, wanted)


def test_what_it_cannot_do_is_left_to_torch() -> None:
    cache = torch.zeros(2, 2, 16, 64)
    assert can_keep([cache])
    assert not can_keep([cache.half()])
    assert not can_keep([cache.transpose(1, 2)])
    assert not can_keep([cache, cache.bfloat16()])
