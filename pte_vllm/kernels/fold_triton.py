"""Encoding evicted blocks on a GPU: one launch for all layers and sequences that fold at once.

Definition: `method.reference.moments` of what `cache_layout.read_evicted` reads. Keys and values go
from the paged cache through W_K and W_V into Σ kᵀv and Σ kᵀk without a copy of them in memory; the
PyTorch path would write them out in fp32, 50 GB where a few hundred long sequences fold in step.
All arithmetic is fp32 ("ieee", no TF32), whatever the cache holds.

Letters in shapes: L layers with a state, S sequences, n blocks that each folds, m = n · bs tokens,
P parts of m, H KV heads, D head size, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable
from pte_vllm.kernels.cache_triton import CacheTable, to_float
from pte_vllm.method.reference import LayerEncoder, Moments

MAX_RANK = 128
"""Beyond it the two sums of a program do not fit into registers."""
_TOKENS = 128
"""Tokens of one program; a constant, so that a fold gives the same bits in any company."""
_TILE = 32
_MAX_PARTIAL_BYTES = 256 * 2**20


@triton.jit  # type: ignore[untyped-decorator]
def _load_x(rows, index, live, inside, scale, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers `index: [CHUNK]` of a head, of each token: `[TILE, CHUNK]` fp32."""
    mask = live[:, None] & inside[None, :]
    stored = tl.load(rows[:, None] + index[None, :], mask=mask, other=0)
    return to_float(stored, FORMAT) * scale


@triton.jit
def _load_w(weight, index, inside, row, rank, width):  # type: ignore[no-untyped-def]
    """The columns of W, `[r, H * D]`, for these numbers: `[CHUNK, BLOCK_R]`."""
    mask = inside[:, None] & (row < rank)[None, :]
    return tl.load(weight + row[None, :] * width + index[:, None], mask=mask, other=0.0)


# Numbers that change from fold to fold must not each get a compilation of their own.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["blocks_ptr", "positions_ptr", "num_seqs", "num_parts", "num_blocks"]
)
def _moments_kernel(  # type: ignore[no-untyped-def]
    example_ptr,  # any of the caches, for its type
    caches_ptr,  # [L] int64: where the cache of each layer, [blocks, H, bs, 2 D], starts
    scales_ptr,  # [L, 2] fp32: of stored keys and values
    blocks_ptr,  # [S, n] int64
    positions_ptr,  # [S, n] int64
    cos_ptr,  # [positions, HALF] fp32
    sin_ptr,
    w_k_ptr,  # [L, r, H * D] fp32
    w_v_ptr,
    b_k_ptr,  # [L, r] fp32
    b_v_ptr,
    kv_ptr,  # [L, S, P, r, r] fp32
    kk_ptr,
    num_seqs,
    num_parts,
    num_blocks,
    block_size,
    num_heads,
    rank,
    stride_block,
    stride_head,
    stride_token,
    FORMAT: tl.constexpr,  # as `to_float`
    SQUARED: tl.constexpr,  # whether φ squares keys
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of the rotated numbers; 0 leaves keys as cached
    WITH_KK: tl.constexpr,
    CHUNK: tl.constexpr,  # of a head's numbers; small, as operands of a product sit in registers
    BLOCK_R: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    sequence = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    layer = tl.program_id(1).to(tl.int64)
    width = num_heads * DIM
    row = tl.arange(0, BLOCK_R)
    chunk = tl.arange(0, CHUNK)
    # An address read from memory says nothing of its alignment; the host has checked it.
    address = tl.load(caches_ptr + layer)
    cache = tl.multiple_of(address.to(tl.pointer_type(example_ptr.dtype.element_ty)), 16)
    k_scale = tl.load(scales_ptr + 2 * layer)
    v_scale = tl.load(scales_ptr + 2 * layer + 1)
    b_k = tl.load(b_k_ptr + layer * rank + row, mask=row < rank, other=0.0)
    b_v = tl.load(b_v_ptr + layer * rank + row, mask=row < rank, other=0.0)
    kv = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    kk = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    num_tokens = num_blocks * block_size
    for start_token in range(part * TOKENS, min(num_tokens, (part + 1) * TOKENS), TILE):
        token = start_token + tl.arange(0, TILE)
        live = token < num_tokens
        own = sequence * num_blocks + token // block_size
        block = tl.load(blocks_ptr + own, mask=live, other=0)
        first = tl.load(positions_ptr + own, mask=live, other=0)
        rows = cache + block * stride_block + (token % block_size) * stride_token
        turns = (first + token % block_size) * HALF  # where the token's cos and sin start
        w_k = w_k_ptr + layer * rank * width
        w_v = w_v_ptr + layer * rank * width
        k = tl.zeros((TILE, BLOCK_R), dtype=tl.float32)
        v = tl.zeros((TILE, BLOCK_R), dtype=tl.float32)
        for _ in range(num_heads):
            for start in range(0, HALF, CHUNK):  # undoing RoPE, as method.rope.unrotate
                index = start + chunk
                inside = index < HALF
                at, mask = turns[:, None] + index[None, :], live[:, None] & inside[None, :]
                cos = tl.load(cos_ptr + at, mask=mask, other=1.0)
                sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
                scale = 1.0 / (cos * cos + sin * sin)
                x1 = _load_x(rows, index, live, inside, k_scale, FORMAT)
                x2 = _load_x(rows + HALF, index, live, inside, k_scale, FORMAT)
                w1 = _load_w(w_k, index, inside, row, rank, width)
                k = tl.dot((x1 * cos + x2 * sin) * scale, w1, k, input_precision="ieee")
                w2 = _load_w(w_k + HALF, index, inside, row, rank, width)
                k = tl.dot((x2 * cos - x1 * sin) * scale, w2, k, input_precision="ieee")
            for start in range(2 * HALF, DIM, CHUNK):  # what was never turned
                index = start + chunk
                inside = index < DIM
                x = _load_x(rows, index, live, inside, k_scale, FORMAT)
                w = _load_w(w_k, index, inside, row, rank, width)
                k = tl.dot(x, w, k, input_precision="ieee")
            for start in range(0, DIM, CHUNK):
                index = start + chunk
                inside = index < DIM
                x = _load_x(rows + DIM, index, live, inside, v_scale, FORMAT)
                w = _load_w(w_v, index, inside, row, rank, width)
                v = tl.dot(x, w, v, input_precision="ieee")
            rows += stride_head
            w_k += DIM
            w_v += DIM
        # Tokens past the end would add their biases.
        k = tl.where(live[:, None], k + b_k[None, :], 0.0)
        if SQUARED:
            k = k * k
        v = tl.where(live[:, None], v + b_v[None, :], 0.0)
        kv = tl.dot(tl.trans(k), v, kv, input_precision="ieee")
        if WITH_KK:
            kk = tl.dot(tl.trans(k), k, kk, input_precision="ieee")
    out = ((layer * num_seqs + sequence) * num_parts + part) * rank * rank
    cell = row[:, None] * rank + row[None, :]
    used = (row < rank)[:, None] & (row < rank)[None, :]
    tl.store(kv_ptr + out + cell, kv, mask=used)
    if WITH_KK:
        tl.store(kk_ptr + out + cell, kk, mask=used)


def unusable(caches: Sequence[Tensor], layout: BlockLayout, rank: int) -> str | None:
    """Return why the kernel cannot read these caches for an encoder of this rank, or None."""
    block_size, dim = layout.key_index.shape
    cells = torch.arange(block_size * 2 * dim, device=layout.key_index.device)
    keys, values = cells.view(block_size, 2 * dim).chunk(2, -1)
    if not (torch.equal(layout.key_index, keys) and torch.equal(layout.value_index, values)):
        return "the attention kernel keeps keys or values out of order"
    if len({(cache.stride(), cache.dtype) for cache in caches}) != 1:
        return "layers have caches of different strides or types"
    if caches[0].stride(-1) != 1 or any(cache.data_ptr() % 16 for cache in caches):
        return "caches are not aligned"
    if rank > MAX_RANK:
        return f"rank {rank} exceeds {MAX_RANK}"
    return None


def evicted_moments(
    table: CacheTable,
    encoder: LayerEncoder,
    block_ids: Tensor,
    positions: Tensor,
    rope: RopeTable | None,
    *,
    with_kk: bool,
) -> Moments:
    """Compute `method.reference.moments` of the blocks that S sequences fold, `[L, S, r, r]`.

    Nothing waits for the device.

    Args:
        table: The caches of the L layers that have a state.
        encoder: The adapter's encoder of those layers, every tensor `[L, ...]`, fp32, contiguous.
        block_ids: The n blocks that each sequence folds, `[S, n]` int64 in token order; m = n * bs.
        positions: The position of the first token of each of these blocks, `[S, n]` int64.
        rope: The model's table, to undo RoPE; None leaves keys as cached.
        with_kk: Whether Σ kᵀk is needed too.
    """
    num_seqs, num_blocks = block_ids.shape
    num_layers, rank = encoder.w_k.shape[:2]
    num_tokens = num_blocks * table.caches[0].shape[2]
    num_parts = triton.cdiv(num_tokens, _TOKENS)
    per_sequence = num_layers * num_parts * rank * rank * 4 * (2 if with_kk else 1)
    at_once = max(1, _MAX_PARTIAL_BYTES // per_sequence)
    found = [
        _launch(
            table,
            encoder,
            block_ids[start : start + at_once],
            positions[start : start + at_once],
            rope,
            num_parts,
            with_kk,
        )
        for start in range(0, num_seqs, at_once)
    ]
    kv, kk = (
        torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)
    )
    return Moments(kv=kv, kk=kk if with_kk else None, num_tokens=num_tokens)


def _launch(
    table: CacheTable,
    encoder: LayerEncoder,
    block_ids: Tensor,
    positions: Tensor,
    rope: RopeTable | None,
    num_parts: int,
    with_kk: bool,
) -> tuple[Tensor, Tensor]:
    cache = table.caches[0]
    _, num_heads, block_size, width = cache.shape
    dim, half = width // 2, 0 if rope is None else rope.cos.shape[1]
    (num_seqs, num_blocks), (num_layers, rank) = block_ids.shape, encoder.w_k.shape[:2]
    kv = torch.empty(
        num_layers, num_seqs, num_parts, rank, rank, dtype=torch.float32, device=cache.device
    )
    kk = torch.empty_like(kv) if with_kk else kv
    _moments_kernel[(num_seqs * num_parts, num_layers)](
        cache,
        table.addresses,
        table.scales,
        block_ids,
        positions,
        kv if rope is None else rope.cos,
        kv if rope is None else rope.sin,
        encoder.w_k,
        encoder.w_v,
        encoder.b_k,
        encoder.b_v,
        kv,
        kk,
        num_seqs,
        num_parts,
        num_blocks,
        block_size,
        num_heads,
        rank,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        FORMAT=table.format,
        SQUARED=encoder.features == "squared",
        DIM=dim,
        HALF=half,
        WITH_KK=with_kk,
        TILE=_TILE,
        TOKENS=_TOKENS,
        **launch_options(dim, rank),
    )
    kv_sum = kv.sum(2)
    return kv_sum, kk.sum(2) if with_kk else kv_sum


def launch_options(dim: int, rank: int) -> dict[str, int]:
    """Return block sizes and warps; with these a program stays in registers on sm_80 and sm_90."""
    block_r = max(16, triton.next_power_of_2(rank))
    return {
        "CHUNK": 32 if dim > 64 else 16,
        "BLOCK_R": block_r,
        "num_warps": max(4, block_r // 8),
        "num_stages": 2,
    }
