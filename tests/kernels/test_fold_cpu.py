"""The compiled fold against its definition: what is read from the cache, through the reference."""

from __future__ import annotations

import pytest
import torch

from pte_vllm.kernels import native
from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable, read_evicted
from pte_vllm.kernels.fold_cpu import MAX_RANK, can_fold, moments_cpu
from pte_vllm.method.reference import LayerEncoder, moments

LAYERS, HEADS, BLOCKS = 3, 2, 9


def _encoder(rank: int, d_kv: int, features: str) -> LayerEncoder:
    generator = torch.Generator().manual_seed(rank)
    shapes = {
        **{name: (rank, d_kv) for name in ("query", "global_", "w_q", "w_k", "w_v")},
        **{"gain": (), "log_ridge": (), "b_k": (rank,), "b_v": (rank,)},
    }
    return LayerEncoder(
        **{n: torch.randn(LAYERS, *s, generator=generator) for n, s in shapes.items()},
        features=features,
    )


@pytest.mark.parametrize("rank", [8, 16, 24, 32, 48, 64, 100])
@pytest.mark.parametrize(
    ("block_size", "dim", "rotary", "num_blocks"),
    [(32, 64, 64, 2), (16, 80, 32, 5), (17, 48, 0, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments(
    rank: int, block_size: int, dim: int, rotary: int, num_blocks: int, dtype: torch.dtype
) -> None:
    library = native.load()
    generator = torch.Generator().manual_seed(dim)
    caches = [
        torch.randn(BLOCKS, HEADS, block_size, 2 * dim, generator=generator).to(dtype)
        for _ in range(LAYERS)
    ]
    sequences = 3 if num_blocks < 3 else 1
    block_ids = torch.randperm(BLOCKS, generator=generator)[: sequences * num_blocks]
    for cache in caches:  # whatever else is in the pool must not matter
        unused = torch.ones(BLOCKS, dtype=torch.bool)
        unused[block_ids] = False
        cache[unused] = float("nan")
    block_ids = block_ids.view(sequences, num_blocks)
    # Any order of a head's numbers within a block.
    order = torch.randperm(2 * block_size * dim, generator=generator).view(2, block_size, dim)
    layout = BlockLayout(key_index=order[0], value_index=order[1])
    positions = torch.randint(0, 230, (sequences, num_blocks), generator=generator)
    angle = torch.rand(300, max(rotary // 2, 1), generator=generator) * 6
    rope = RopeTable(cos=1.3 * angle.cos(), sin=1.3 * angle.sin()) if rotary else None
    encoder = _encoder(rank, HEADS * dim, "squared" if rank in (24, 64) else "linear")

    assert can_fold(caches, rank)
    k_e, v_e = read_evicted(caches, layout, block_ids, positions, rope)
    for with_kk in (True, False):
        wanted = moments(encoder.map(lambda t: t[:, None]), k_e, v_e, with_kk=with_kk)
        found = moments_cpu(
            library, caches, layout, block_ids, positions, rope, encoder, with_kk=with_kk
        )
        assert found.num_tokens == wanted.num_tokens == num_blocks * block_size
        assert _error(found.kv, wanted.kv) < 1e-5
        assert (found.kk is None) == (wanted.kk is None) == (not with_kk)
        if found.kk is not None:
            assert _error(found.kk, wanted.kk) < 1e-5
    # Alone or beside others: the same bits.
    alone = moments_cpu(
        library, caches, layout, block_ids[:1], positions[:1], rope, encoder, with_kk=False
    )
    assert torch.equal(alone.kv, found.kv[:, :1])


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def test_what_it_cannot_do_is_left_to_torch() -> None:
    cache = torch.zeros(2, 2, 16, 64)
    assert can_fold([cache], 32)
    assert not can_fold([cache.half()], 32)
    assert not can_fold([cache], MAX_RANK + 1)
    assert not can_fold([cache.transpose(1, 2)], 32)
    assert not can_fold([cache, cache.bfloat16()], 32)
