"""Keys and values come back from the paged cache as they went in, whatever the kernel's order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable, read_evicted
from pte_vllm.method.rope import rotate_half


class _CPUImpl:
    """The cache update of vLLM's CPU backend, without an engine around it."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        blocks, heads, size, _ = kv_cache.shape
        key_cache, value_cache = kv_cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            self.isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )


def _layer(
    block_size: int, dim: int, dtype: torch.dtype, *, heads: int = 3, blocks: int = 7
) -> SimpleNamespace:
    cache = torch.full((blocks, heads, block_size, 2 * dim), float("nan"), dtype=dtype)
    isa = _get_attn_isa(dtype, block_size, dim)
    return SimpleNamespace(kv_cache=cache, impl=_CPUImpl(isa))


@pytest.mark.parametrize(
    ("block_size", "dim"), [(32, 64), (64, 32), (128, 128), (32, 80), (96, 96)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_read_back(block_size: int, dim: int, dtype: torch.dtype) -> None:
    layer = _layer(block_size, dim, dtype)
    order = [5, 1, 3]
    slots = torch.cat([b * block_size + torch.arange(block_size) for b in order])
    k, v = torch.randn(2, len(slots), 3, dim).to(dtype)
    layer.impl.do_kv_cache_update(layer, k.clone(), v.clone(), layer.kv_cache, slots)
    layout = BlockLayout.probe(layer)
    (found_k,), (found_v,) = layout.gather([layer.kv_cache], torch.tensor(order))
    assert torch.equal(found_k, k.float())
    assert torch.equal(found_v, v.float())


def test_rope_is_undone_by_position_and_sequence() -> None:
    """Two sequences fold two blocks each, that stand in different places; of one, far apart."""
    block_size, dim, first = 32, 32, torch.tensor([[96, 128], [32, 160]])
    layer = _layer(block_size, dim, torch.float32, heads=2)
    positions = (first[..., None] + torch.arange(block_size)).flatten()
    angle = torch.arange(200)[:, None] / 100 ** (torch.arange(dim // 2) / (dim // 2))
    rope = RopeTable(cos=angle.cos(), sin=angle.sin())
    k, v = torch.randn(2, 4 * block_size, 2, dim)
    cos, sin = (torch.cat([t[positions]] * 2, -1)[:, None] for t in (rope.cos, rope.sin))
    rotated = k * cos + rotate_half(k) * sin
    blocks = torch.tensor([[5, 1], [0, 3]])
    slots = (blocks.flatten()[:, None] * block_size + torch.arange(block_size)).flatten()
    layer.impl.do_kv_cache_update(layer, rotated, v, layer.kv_cache, slots)
    layout, both = BlockLayout.probe(layer), (2, 2 * block_size, -1)
    k_e, v_e = read_evicted([layer.kv_cache], layout, blocks, first, rope)
    torch.testing.assert_close(k_e[0], k.view(*both), atol=1e-5, rtol=0)
    assert torch.equal(v_e[0], v.view(*both))
    k_e, _ = read_evicted([layer.kv_cache], layout, blocks, first, None)
    assert torch.equal(k_e[0], rotated.view(*both))


def test_a_cache_that_cannot_be_read_back_is_refused() -> None:
    layer = _layer(32, 32, torch.float32)
    layer.impl.do_kv_cache_update = lambda *args: None
    with pytest.raises(RuntimeError, match="--attention-backend"):
        BlockLayout.probe(layer)
