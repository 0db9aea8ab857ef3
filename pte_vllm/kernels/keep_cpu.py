"""Kept tokens on a CPU: all layers, heads and sequences that select at once in one call each.

Definition: `keep_torch`, which writes the candidates of every layer to memory several times over;
`keep_cpu.cpp` reads the cache once. Shapes and letters are those of `keep_torch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout
from pte_vllm.kernels.fold_cpu import CACHE_DTYPES
from pte_vllm.kernels.keep_torch import ProbedCache
from pte_vllm.method import keep


def can_keep(caches: Sequence[Tensor]) -> bool:
    """Return whether the compiled code knows caches of this kind."""
    cache = caches[0]
    return (
        cache.device.type == "cpu"
        and cache.dtype in CACHE_DTYPES
        and all(c.stride() == cache.stride() and c.dtype == cache.dtype for c in caches)
        and cache.stride()[2:] == (cache.shape[3], 1)
    )


def expected_scores_cpu(
    library: ctypes.CDLL,
    caches: Sequence[Tensor],
    layout: BlockLayout,
    probed: ProbedCache,
    candidates: Tensor,
    newest: Tensor,
    fold_at: Tensor,
) -> Tensor:
    """Do what `keep_torch.expected_scores` does, on caches as `can_keep` wants them."""
    num_sequences, num_candidates = candidates.shape
    rope, queries = probed.rope, probed.queries.contiguous()
    if rope is None:
        positions = torch.zeros(num_sequences, queries.shape[2], dtype=torch.int64)
    else:
        positions = keep.probe_positions(fold_at, queries.shape[2], len(rope.cos)).contiguous()
    block_size, heads = caches[0].shape[2], caches[0].shape[1]
    scores = torch.empty(len(caches), num_sequences, heads, num_candidates * block_size)
    candidates, newest = candidates.contiguous(), newest.contiguous()
    cache, keep_alive = _cache(caches, layout, num_sequences, probed.scales)
    function = getattr(library, f"pte_keep_scores_{_suffix(caches)}")
    function(
        *cache,
        *(queries.data_ptr(), positions.data_ptr()),
        *((None, None) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr())),
        *(queries.shape[2], 0 if rope is None else rope.cos.shape[1], probed.scale),
        *(candidates.data_ptr(), num_candidates, newest.data_ptr(), newest.shape[1]),
        scores.data_ptr(),
    )
    del keep_alive
    return scores


def take_cpu(
    library: ctypes.CDLL,
    caches: Sequence[Tensor],
    layout: BlockLayout,
    candidates: Tensor,
    kept: Tensor,
) -> Tensor:
    """Do what `keep_torch.take` does."""
    taken = caches[0].new_empty(*kept.shape, caches[0].shape[3])
    _copy(library, caches, layout, candidates, kept.contiguous(), taken, out_of_cache=True)
    return taken


def put_cpu(
    library: ctypes.CDLL,
    caches: Sequence[Tensor],
    layout: BlockLayout,
    own: Tensor,
    taken: Tensor,
) -> None:
    """Do what `keep_torch.put` does."""
    _copy(library, caches, layout, own, None, taken.contiguous(), out_of_cache=False)


def _copy(
    library: ctypes.CDLL,
    caches: Sequence[Tensor],
    layout: BlockLayout,
    blocks: Tensor,
    places: Tensor | None,
    staged: Tensor,
    *,
    out_of_cache: bool,
) -> None:
    blocks = blocks.contiguous()
    cache, keep_alive = _cache(caches, layout, len(blocks))
    function = getattr(library, f"pte_keep_copy_{_suffix(caches)}")
    function(
        *cache,
        *(blocks.data_ptr(), blocks.shape[1]),
        *(None if places is None else places.data_ptr(), staged.shape[3]),
        *(staged.data_ptr(), out_of_cache),
    )
    del keep_alive


def _suffix(caches: Sequence[Tensor]) -> str:
    return str(caches[0].dtype).removeprefix("torch.")


def _cache(
    caches: Sequence[Tensor],
    layout: BlockLayout,
    num_sequences: int,
    scales: Tensor | None = None,
) -> tuple[tuple[object, ...], object]:
    """Return the arguments that every function begins with, and what must outlive the call."""
    pointers = (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches))
    cells = torch.cat((layout.key_index, layout.value_index), -1).contiguous()
    _, heads, block_size, width = caches[0].shape
    sizes = (len(caches), num_sequences, heads, block_size, width // 2)
    scales = None if scales is None else scales.contiguous()
    where = pointers, None if scales is None else scales.data_ptr(), *caches[0].stride()[:2]
    return (*where, cells.data_ptr(), *sizes), (cells, scales)
