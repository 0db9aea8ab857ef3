"""Kept tokens on a GPU: scores, and copies of what is kept, in a few launches for all that select.

Definition: `keep_torch`, whose shapes and letters these are. Candidates are read from the paged
cache twice: for all that a probe attends to, and for its shares. All is computed in fp32, no TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pte_vllm.kernels.cache_numbers import raw
from pte_vllm.kernels.cache_triton import CacheTable, to_float
from pte_vllm.kernels.keep_torch import ProbedCache
from pte_vllm.method import keep

_TILE = 32
"""Tokens, and probes, of a program at a time."""


@triton.jit
def _program(example_ptr, caches_ptr, num_heads, num_parts, stride_head):  # type: ignore[no-untyped-def]
    """Which part, head, sequence and layer a program has, and where the head's cache starts."""
    part = tl.program_id(0) % num_parts
    head = tl.program_id(0) // num_parts % num_heads
    sequence = tl.program_id(0) // num_parts // num_heads
    layer = tl.program_id(1).to(tl.int64)
    # An address read from memory says nothing of its alignment; the host has checked it.
    address = tl.load(caches_ptr + layer)
    cache = tl.multiple_of(address.to(tl.pointer_type(example_ptr.dtype.element_ty)), 16)
    return part, head, sequence, layer, cache + head * stride_head


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    cache, blocks, place, live, block_size, stride_block, stride_token
):
    """Where the keys of the tokens in these places of a sequence's `blocks` begin."""
    block = tl.load(blocks + place // block_size, mask=live, other=0)
    return cache + block * stride_block + (place % block_size) * stride_token


@triton.jit  # type: ignore[untyped-decorator]
def _logits(  # type: ignore[no-untyped-def]
    rows,  # [TOKENS] where each token's keys begin
    live,  # [TOKENS]
    probe,  # [PROBES] where each probe's numbers begin
    turns,  # [PROBES] where the cos and sin of each begin
    known,  # [PROBES]
    cos_ptr,
    sin_ptr,
    scale,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """What probes, turned to their positions, pay tokens: `[PROBES, TOKENS]`."""
    chunk = tl.arange(0, CHUNK)
    logits = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, HALF, CHUNK):
        index = start + chunk
        inside = index < HALF
        mask = known[:, None] & inside[None, :]
        cos = tl.load(cos_ptr + turns[:, None] + index[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + turns[:, None] + index[None, :], mask=mask, other=0.0)
        q1 = tl.load(probe[:, None] + index[None, :], mask=mask, other=0.0)
        q2 = tl.load(probe[:, None] + HALF + index[None, :], mask=mask, other=0.0)
        mask = live[None, :] & inside[:, None]
        k1 = to_float(tl.load(rows[None, :] + index[:, None], mask=mask, other=0), FORMAT)
        k2 = to_float(tl.load(rows[None, :] + HALF + index[:, None], mask=mask, other=0), FORMAT)
        logits = tl.dot(q1 * cos - q2 * sin, k1, logits, input_precision="ieee")
        logits = tl.dot(q2 * cos + q1 * sin, k2, logits, input_precision="ieee")
    for start in range(2 * HALF, DIM, CHUNK):  # what is never turned
        index = start + chunk
        inside = index < DIM
        mask = known[:, None] & inside[None, :]
        q = tl.load(probe[:, None] + index[None, :], mask=mask, other=0.0)
        mask = live[None, :] & inside[:, None]
        k = to_float(tl.load(rows[None, :] + index[:, None], mask=mask, other=0), FORMAT)
        logits = tl.dot(q, k, logits, input_precision="ieee")
    return logits * scale


# Numbers that change from fold to fold must not each get a compilation of their own.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["blocks_ptr", "num_blocks", "num_wanted", "num_seqs", "num_parts"]
)
def _attention_kernel(  # type: ignore[no-untyped-def]
    example_ptr,  # any of the caches, for its type
    caches_ptr,  # [L] int64: where the cache of each layer, [blocks, H, bs, 2 D], starts
    scales_ptr,  # [L, 2] fp32: of stored keys and values
    blocks_ptr,  # [S, blocks] int64: candidates, then the newest
    queries_ptr,  # [L, H, n, D] fp32
    positions_ptr,  # [S, n] int64
    cos_ptr,  # [positions, HALF] fp32
    sin_ptr,
    totals_ptr,  # [L, S, H, n] fp32: logarithm of the sum of all that a probe pays
    scores_ptr,  # [L, S, H, C] fp32
    num_blocks,
    num_wanted,  # how many of them hold candidates
    num_seqs,
    num_parts,  # of the n probes, or of the C candidates
    num_probes,
    block_size,
    num_heads,
    stride_block,
    stride_head,
    stride_token,
    scale,
    SCORES: tl.constexpr,  # whether to write scores from known totals, or totals
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,  # as `cache_triton.to_float`
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    part, head, sequence, layer, cache = _program(
        example_ptr, caches_ptr, num_heads, num_parts, stride_head
    )
    blocks = blocks_ptr + sequence * num_blocks
    own = (layer * num_seqs + sequence) * num_heads + head
    queries = queries_ptr + (layer * num_heads + head) * num_probes * DIM
    lane = tl.arange(0, TILE)
    scale *= tl.load(scales_ptr + 2 * layer)  # a product with keys is as much larger as they are
    if SCORES:
        token = part * TILE + lane
        live = token < num_wanted * block_size
        rows = _rows(cache, blocks, token, live, block_size, stride_block, stride_token)
        squares = tl.zeros((TILE,), dtype=tl.float32)
        for first in range(0, num_probes, TILE):
            i = first + lane
            known = i < num_probes
            at = tl.load(positions_ptr + sequence * num_probes + i, mask=known, other=0)
            logits = _logits(
                rows, live, queries + i * DIM, at * HALF, known, cos_ptr, sin_ptr, scale,
                DIM, HALF, FORMAT, CHUNK, TILE,
            )  # fmt: skip
            total = tl.load(totals_ptr + own * num_probes + i, mask=known, other=0.0)
            share = tl.where(known[:, None], tl.exp(logits - total[:, None]), 0.0)
            squares += tl.sum(share * share, 0)
        v_scale = tl.load(scales_ptr + 2 * layer + 1)
        norms = tl.zeros((TILE,), dtype=tl.float32)
        chunk = tl.arange(0, CHUNK)
        for start in range(0, DIM, CHUNK):
            index = start + chunk
            mask = live[:, None] & (index < DIM)[None, :]
            v = tl.load(rows[:, None] + DIM + index[None, :], mask=mask, other=0)
            v = to_float(v, FORMAT) * v_scale
            norms += tl.sum(v * v, 1)
        found = tl.sqrt(squares / num_probes) * tl.sqrt(norms)
        tl.store(scores_ptr + own * num_wanted * block_size + token, found, mask=live)
    else:
        i = part * TILE + lane
        known = i < num_probes
        at = tl.load(positions_ptr + sequence * num_probes + i, mask=known, other=0)
        most = tl.full((TILE,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((TILE,), dtype=tl.float32)
        for first in range(0, num_blocks * block_size, TILE):
            token = first + lane
            live = token < num_blocks * block_size
            rows = _rows(cache, blocks, token, live, block_size, stride_block, stride_token)
            logits = _logits(
                rows, live, queries + i * DIM, at * HALF, known, cos_ptr, sin_ptr, scale,
                DIM, HALF, FORMAT, CHUNK, TILE,
            )  # fmt: skip
            logits = tl.where(live[None, :], logits, float("-inf"))
            higher = tl.maximum(most, tl.max(logits, 1))
            total = total * tl.exp(most - higher)
            total += tl.sum(tl.exp(logits - higher[:, None]), 1)
            most = higher
        tl.store(totals_ptr + own * num_probes + i, most + tl.log(total), mask=known)


@triton.jit(do_not_specialize=["blocks_ptr", "num_blocks", "num_seqs", "num_parts"])  # type: ignore[untyped-decorator]
def _copy_kernel(  # type: ignore[no-untyped-def]
    example_ptr,
    caches_ptr,  # [L] int64
    blocks_ptr,  # [S, blocks] int64
    places_ptr,  # [L, S, H, K] int64: which tokens of the blocks
    staged_ptr,  # [L, S, H, K, 2 D]
    num_blocks,
    num_seqs,
    num_parts,
    count,  # K
    block_size,
    num_heads,
    stride_block,
    stride_head,
    stride_token,
    OUT: tl.constexpr,  # out of the cache, or into it, where all tokens of the blocks are written
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    part, head, sequence, layer, cache = _program(
        example_ptr, caches_ptr, num_heads, num_parts, stride_head
    )
    blocks = blocks_ptr + sequence * num_blocks
    own = (layer * num_seqs + sequence) * num_heads + head
    i = part * TILE + tl.arange(0, TILE)
    live = i < count
    place = i.to(tl.int64)
    if OUT:
        place = tl.load(places_ptr + own * count + i, mask=live, other=0)
    rows = _rows(cache, blocks, place, live, block_size, stride_block, stride_token)
    copied = staged_ptr + (own * count + i) * WIDTH
    for start in range(0, WIDTH, CHUNK):
        index = start + tl.arange(0, CHUNK)
        mask = live[:, None] & (index < WIDTH)[None, :]
        if OUT:
            numbers = tl.load(rows[:, None] + index[None, :], mask=mask, other=0)
            tl.store(copied[:, None] + index[None, :], numbers, mask=mask)
        else:
            numbers = tl.load(copied[:, None] + index[None, :], mask=mask, other=0)
            tl.store(rows[:, None] + index[None, :], numbers, mask=mask)


def expected_scores_triton(
    table: CacheTable, probed: ProbedCache, candidates: Tensor, newest: Tensor, fold_at: Tensor
) -> Tensor:
    """Do what `keep_torch.expected_scores` does, on caches that `fold_triton.unusable` allows."""
    cache, queries, rope = table.caches[0], probed.queries, probed.rope
    num_layers, num_heads, num_probes, dim = queries.shape
    num_seqs, num_wanted = candidates.shape
    block_size = cache.shape[2]
    blocks = torch.cat((candidates, newest), 1).contiguous()
    table_size = 1 if rope is None else len(rope.cos)
    positions = keep.probe_positions(fold_at, num_probes, table_size).contiguous()
    totals = queries.new_empty(num_layers, num_seqs, num_heads, num_probes)
    scores = queries.new_empty(num_layers, num_seqs, num_heads, num_wanted * block_size)
    for with_scores, count in ((False, num_probes), (True, num_wanted * block_size)):
        num_parts = triton.cdiv(count, _TILE)
        _attention_kernel[(num_seqs * num_heads * num_parts, num_layers)](
            cache,
            table.addresses,
            table.scales,
            blocks,
            queries,
            positions,
            totals if rope is None else rope.cos,
            totals if rope is None else rope.sin,
            totals,
            scores,
            blocks.shape[1],
            num_wanted,
            num_seqs,
            num_parts,
            num_probes,
            block_size,
            num_heads,
            *cache.stride()[:3],
            probed.scale,
            SCORES=with_scores,
            DIM=dim,
            HALF=0 if rope is None else rope.cos.shape[1],
            FORMAT=table.format,
            CHUNK=32 if dim > 64 else 16,
            TILE=_TILE,
        )
    return scores


def take_triton(table: CacheTable, candidates: Tensor, kept: Tensor) -> Tensor:
    """Do what `keep_torch.take` does."""
    taken: Tensor = table.caches[0].new_empty(*kept.shape, table.caches[0].shape[3])
    _copy(table, candidates.contiguous(), kept.contiguous(), taken, out=True)
    return taken.view(table.dtype)


def put_triton(table: CacheTable, own: Tensor, taken: Tensor) -> None:
    """Do what `keep_torch.put` does."""
    _copy(table, own.contiguous(), own, raw(taken), out=False)


def _copy(table: CacheTable, blocks: Tensor, places: Tensor, staged: Tensor, *, out: bool) -> None:
    cache = table.caches[0]
    num_layers, num_seqs, num_heads, count, width = staged.shape
    num_parts = triton.cdiv(count, _TILE)
    _copy_kernel[(num_seqs * num_heads * num_parts, num_layers)](
        cache,
        table.addresses,
        blocks,
        places,
        staged,
        blocks.shape[1],
        num_seqs,
        num_parts,
        count,
        cache.shape[2],
        num_heads,
        *cache.stride()[:3],
        OUT=out,
        WIDTH=width,
        CHUNK=64,
        TILE=_TILE,
    )
