"""Caches as vLLM's GPU backends lay them out, and the fold kernel against the definition.

`python -m tests.kernels.fold_cases` runs the small cases on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable, read_evicted
from pte_vllm.kernels.cache_numbers import raw
from pte_vllm.method import reference
from pte_vllm.method.reference import LayerEncoder

NAN = {torch.float32: float("nan"), torch.bfloat16: float("nan"), torch.uint8: 0x7F}
"""No number, as `cache_numbers.raw` takes it: 0x7F is none in both formats of 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    rank: int
    dim: int
    heads: int
    blocks: int  # that each sequence folds
    block_size: int
    seqs: int
    layers: int
    dtype: torch.dtype = torch.float32
    layout: str = "NHD"
    """Within a layer: NHD or HND; BLHNC interleaves the layers of a block."""
    rotary: int | None = None
    """Numbers of a head that RoPE turns; None: all, 0: keys stay as cached."""
    with_kk: bool = True
    features: str = "linear"
    scales: bool = False
    """Whether each layer has scales of its own for keys and values."""


_PLAIN = (
    Case(rank=8, dim=64, heads=2, blocks=1, block_size=16, seqs=2, layers=1),
    Case(
        rank=24,
        dim=80,
        heads=1,
        blocks=3,
        block_size=16,
        seqs=1,
        layers=2,
        layout="HND",
        features="squared",
    ),
    Case(rank=32, dim=128, heads=2, blocks=5, block_size=32, seqs=1, layers=1, layout="BLHNC"),
    Case(
        rank=64,
        dim=64,
        heads=1,
        blocks=2,
        block_size=16,
        seqs=3,
        layers=2,
        dtype=torch.bfloat16,
        rotary=0,
    ),
    Case(
        rank=12,
        dim=80,
        heads=3,
        blocks=2,
        block_size=16,
        seqs=1,
        layers=1,
        dtype=torch.bfloat16,
        rotary=32,
        layout="BLHNC",
        with_kk=False,
    ),
)
SMALL = (
    *_PLAIN,
    replace(_PLAIN[0], dtype=torch.float8_e4m3fn, scales=True, blocks=2, layers=2),
    replace(_PLAIN[1], dtype=torch.float8_e5m2, scales=True, seqs=2, rotary=32, layout="BLHNC"),
)
LARGE = tuple(
    Case(
        rank=rank,
        dim=dim,
        heads=heads,
        blocks=blocks,
        block_size=block_size,
        seqs=17,
        layers=5,
        dtype=dtype,
        layout=layout,
    )
    for rank, dim, heads, blocks, block_size in (
        (8, 64, 3, 5, 16),
        (24, 80, 8, 1, 32),
        (32, 128, 4, 32, 16),
        (64, 128, 8, 3, 32),
        (128, 256, 2, 4, 64),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    for layout in ("NHD", "HND")
)


def make_caches(case: Case, num_blocks: int, device: str) -> list[Tensor]:
    """`[blocks, H, bs, 2 D]` per layer; only strides tell the layouts apart."""
    size = case.heads, case.block_size, 2 * case.dim
    if case.layout == "BLHNC":
        whole = torch.randn(num_blocks, case.layers, *size, device=device).to(case.dtype)
        return list(whole.unbind(1))
    heads, tokens, width = size
    if case.layout == "HND":
        shape = (num_blocks, heads, tokens, width)
        return [torch.randn(shape, device=device).to(case.dtype) for _ in range(case.layers)]
    shape = (num_blocks, tokens, heads, width)
    return [
        torch.randn(shape, device=device).to(case.dtype).transpose(1, 2) for _ in range(case.layers)
    ]


def make_scales(case: Case, device: str) -> Tensor | None:
    """`[layers, 2]`, far enough from 1 and from each other that none may be left out."""
    return 0.1 + 3 * torch.rand(case.layers, 2, device=device) if case.scales else None


def make_encoder(
    layers: int, rank: int, d_kv: int, device: str, features: str = "linear"
) -> LayerEncoder:
    def noise(*shape: int) -> Tensor:
        return torch.randn(layers, *shape, device=device)

    return LayerEncoder(
        query=noise(rank, d_kv),
        global_=noise(5, d_kv),
        w_q=noise(rank, d_kv),
        w_k=noise(rank, d_kv),
        w_v=noise(rank, d_kv),
        gain=noise(),
        b_k=noise(rank),
        b_v=noise(rank),
        log_ridge=noise(),
        features=features,
    )


def plain_layout(block_size: int, dim: int, device: str) -> BlockLayout:
    """Of the GPU backends: a token's key, then its value."""
    cells = torch.arange(block_size * 2 * dim, device=device).view(block_size, 2 * dim)
    keys, values = cells.chunk(2, -1)
    return BlockLayout(key_index=keys, value_index=values)


def rope_table(numbers: int, positions: int, device: str) -> RopeTable | None:
    """Scaled, as YaRN does, so that undoing it must divide."""
    if not numbers:
        return None
    half = numbers // 2
    frequencies = 100.0 ** -(torch.arange(half) / half)
    angles = torch.arange(positions)[:, None] * frequencies
    return RopeTable(cos=1.3 * angles.cos().to(device), sin=1.3 * angles.sin().to(device))


def check(case: Case, device: str) -> float:
    """Relative error of the kernel against the definition; asserts that it is small."""
    from pte_vllm.kernels.cache_triton import CacheTable
    from pte_vllm.kernels.fold_triton import evicted_moments, unusable

    torch.manual_seed(0)
    pool = case.seqs * case.blocks
    caches = make_caches(case, pool + 4, device)
    order = torch.randperm(pool) + 2
    block_ids = order.view(case.seqs, case.blocks).to(device)
    for cache in map(raw, caches):  # what belongs to others, or to nobody
        cache[:2], cache[-2:] = NAN[cache.dtype], NAN[cache.dtype]
    scales = make_scales(case, device)
    width = case.heads * case.dim
    encoder = make_encoder(case.layers, case.rank, width, device, case.features)
    layout = plain_layout(case.block_size, case.dim, device)
    rotary = case.dim if case.rotary is None else case.rotary
    positions = torch.randint(0, 1000, (case.seqs, case.blocks)).to(device)
    rope = rope_table(rotary, 1000 + case.block_size, device)
    assert unusable(caches, layout, case.rank) is None
    found = evicted_moments(
        CacheTable.of(caches, scales), encoder, block_ids, positions, rope, with_kk=case.with_kk
    )
    k_e, v_e = read_evicted(caches, layout, block_ids, positions, rope, scales)
    by_layer = encoder.map(lambda t: t[:, None].double())
    wanted = reference.moments(by_layer, k_e.double(), v_e.double(), with_kk=True)
    assert found.num_tokens == wanted.num_tokens
    worst = _error(found.kv, wanted.kv)
    if case.with_kk:
        assert found.kk is not None and wanted.kk is not None
        worst = max(worst, _error(found.kk, wanted.kk))
    else:
        assert found.kk is None
    assert worst < 3e-6, f"{case}: relative error {worst:.1e}"
    return worst


def _error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def check_every_byte(device: str) -> None:
    """What the kernels take each of the 256 bytes for, in both formats, against torch."""
    from tests.kernels.byte_kernel import convert

    stored = torch.arange(256, device=device).to(torch.uint8)
    for dtype, name in ((torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2")):
        found = torch.empty(256, device=device)
        convert[(1,)](stored, found, FORMAT=name)
        wanted = stored.view(dtype).float()
        torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)
        numbers = ~wanted.isnan()
        assert torch.equal(found.signbit()[numbers], wanted.signbit()[numbers])


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    check_every_byte("cpu")
    for small in SMALL:
        check(small, "cpu")
    print("ok")
