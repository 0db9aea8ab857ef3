"""Encoding evicted blocks on a CPU: all layers and sequences that fold at once in one call.

Definition: `method.reference.moments` of what `cache_layout.read_evicted` reads. Those two write
keys and values of every layer to memory several times over, in fp32; `fold_cpu.cpp` reads the cache
once.

Letters in shapes: L layers with a state, S sequences, n blocks that each folds, H KV heads, D head
size, r rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable
from pte_vllm.kernels.cache_numbers import FLOAT8
from pte_vllm.method.reference import LayerEncoder, Moments

_LANES = 16  # as cpu_numbers.h
_VECTORS = (1, 2, 4, 8)  # as fold_cpu.cpp
CACHE_DTYPES = (torch.float32, torch.bfloat16, *FLOAT8)
"""Types of a cache that the compiled code reads."""
MAX_RANK = _LANES * _VECTORS[-1]


def can_fold(caches: Sequence[Tensor], rank: int) -> bool:
    """Return whether the compiled code knows caches of this kind, and states of this rank."""
    cache = caches[0]
    return (
        rank <= MAX_RANK
        and cache.device.type == "cpu"
        and cache.dtype in CACHE_DTYPES
        and all(c.stride() == cache.stride() and c.dtype == cache.dtype for c in caches)
        and cache.stride()[2:] == (cache.shape[3], 1)
    )


def moments_cpu(
    library: ctypes.CDLL,
    caches: Sequence[Tensor],
    layout: BlockLayout,
    block_ids: Tensor,
    positions: Tensor,
    rope: RopeTable | None,
    encoder: LayerEncoder,
    *,
    with_kk: bool,
    scales: Tensor | None = None,
) -> Moments:
    """Compute the sums over the blocks that S sequences fold, each `[L, S, r, r]`.

    Args:
        library: The compiled code, from `native.load`.
        caches: The caches of the L layers that have a state, each `[blocks, H, bs, 2 D]` and as
            `can_fold` wants them.
        layout: How the attention backend orders the numbers of a block.
        block_ids: The n blocks that each sequence folds, `[S, n]` int64 in token order.
        positions: The position of the first token of each of these blocks, `[S, n]` int64.
        rope: The model's table, to undo RoPE; None leaves keys as cached.
        encoder: The adapter's encoder of those layers, every tensor `[L, ...]`.
        with_kk: Whether to compute Σ kᵀk as well.
        scales: What the L layers' stored keys and values are multiplied with, `[L, 2]` float32;
            None: with 1.
    """
    _, heads, block_size, width = caches[0].shape
    num_layers, rank, _ = encoder.w_k.shape
    num_sequences, num_blocks = block_ids.shape
    vectors = next(v for v in _VECTORS if v * _LANES >= rank)
    pad = (0, vectors * _LANES - rank)
    w_k, w_v = (F.pad(w.mT, pad).contiguous() for w in (encoder.w_k, encoder.w_v))
    b_k, b_v = (F.pad(b, pad).contiguous() for b in (encoder.b_k, encoder.b_v))
    kv = w_k.new_empty(num_layers, num_sequences, rank, rank)
    kk = torch.empty_like(kv) if with_kk else None
    pointers = (ctypes.c_void_p * num_layers)(*(cache.data_ptr() for cache in caches))
    index = (layout.key_index.contiguous(), layout.value_index.contiguous())
    block_ids, positions = block_ids.contiguous(), positions.contiguous()
    function = getattr(library, f"pte_fold_{str(caches[0].dtype).removeprefix('torch.')}")
    scales = None if scales is None else scales.contiguous()
    function(
        pointers,
        None if scales is None else scales.data_ptr(),
        *caches[0].stride()[:2],
        *(i.data_ptr() for i in index),
        block_ids.data_ptr(),
        positions.data_ptr(),
        *((None, None) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr())),
        *(t.data_ptr() for t in (w_k, w_v, b_k, b_v)),
        *(num_layers, num_sequences, num_blocks, block_size, heads, width // 2),
        *(0 if rope is None else rope.cos.shape[1], rank),
        *(encoder.features == "squared", vectors),
        *(kv.data_ptr(), None if kk is None else kk.data_ptr()),
    )
    return Moments(kv=kv, kk=kk, num_tokens=num_blocks * block_size)
