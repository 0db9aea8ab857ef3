"""Kept tokens in the paged cache by plain torch, on any device and whatever the cache's order.

Definition: `method.keep` over what `cache_layout` reads. `keep_cpu` and `keep_triton` do the same
without a copy of the candidates.

Letters in shapes: L layers, S sequences that select at once, H KV heads, D head size, n probes,
c blocks of candidates, C = c · bs candidates, e newest blocks, K tokens that are kept, in
k = K / bs blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable
from pte_vllm.kernels.cache_numbers import raw
from pte_vllm.method import keep
from pte_vllm.method.rope import rotate


@dataclass(frozen=True, kw_only=True)
class ProbedCache:
    """What a score of kept tokens reads beside the cache: the model's probes, and its RoPE."""

    queries: Tensor
    """`[L, H, n, D]` float32 on the device, before RoPE."""
    rope: RopeTable | None
    """None where the model has no rotary embedding."""
    scale: float
    """What the model multiplies products of queries and keys with."""
    scales: Tensor | None = None
    """What stored keys and values of each layer are multiplied with, `[L, 2]` float32 on the
    device; None: with 1."""

    def turned(self, fold_at: Tensor) -> Tensor:
        """Return the probes as they stand after folds at `fold_at: [S]`, `[L, S, H, n, D]`."""
        if self.rope is None:
            return self.queries[:, None].expand(-1, len(fold_at), -1, -1, -1)
        at = keep.probe_positions(fold_at, self.queries.shape[2], len(self.rope.cos))
        cos, sin = (table[at][:, None] for table in (self.rope.cos, self.rope.sin))
        return rotate(self.queries[:, None], cos, sin)


def expected_scores(
    caches: Sequence[Tensor],
    layout: BlockLayout,
    probed: ProbedCache,
    candidates: Tensor,
    newest: Tensor,
    fold_at: Tensor,
) -> Tensor:
    """Score the candidates of S sequences by the attention of probes, `[L, S, H, C]` float32.

    Args:
        caches: The caches of all L layers, each `[blocks, H, bs, 2 D]`.
        layout: How the attention backend orders the numbers of a block.
        probed: The probes.
        candidates: The blocks of candidates, in position order, `[S, c]` int64.
        newest: The blocks of the newest tokens, `[S, e]` int64.
        fold_at: The position of the first token after the fold, `[S]` int64.
    """
    found = (layout.gather(caches, ids.flatten(), probed.scales) for ids in (candidates, newest))
    (keys, values), (peers, _) = (_by_head(both, len(candidates)) for both in found)
    return keep.expected_scores(probed.turned(fold_at), keys, values, peers, probed.scale)


def _by_head(found: tuple[Tensor, Tensor], num_sequences: int) -> tuple[Tensor, Tensor]:
    """Turn `[L, S * t, H, D]` into `[L, S, H, t, D]`."""
    keys, values = (t.unflatten(1, (num_sequences, -1)).transpose(2, 3) for t in found)
    return keys, values


def take(caches: Sequence[Tensor], layout: BlockLayout, candidates: Tensor, kept: Tensor) -> Tensor:
    """Copy what is kept out of the cache, `[L, S, H, K, 2 D]` in the cache's dtype, bit by bit.

    Args:
        caches: As `expected_scores` has them.
        layout: As `expected_scores` has it.
        candidates: The blocks of candidates, `[S, c]` int64.
        kept: Which of them are kept, `[L, S, H, K]` int64, ascending.
    """
    block_size = len(layout.key_index)
    index = _cells(layout)
    heads = torch.arange(kept.shape[2], device=kept.device)[:, None, None]
    sequences = torch.arange(len(candidates), device=kept.device)[:, None, None]
    blocks = candidates[sequences, kept // block_size]  # [L, S, H, K]
    cells = index[kept % block_size]  # [L, S, H, K, 2 D]
    rows, columns = cells // caches[0].shape[3], cells % caches[0].shape[3]
    taken = [
        raw(cache)[blocks[i, ..., None], heads, rows[i], columns[i]]
        for i, cache in enumerate(caches)
    ]
    return torch.stack(taken).view(caches[0].dtype)


def put(caches: Sequence[Tensor], layout: BlockLayout, own: Tensor, taken: Tensor) -> None:
    """Write what `take` copied into the blocks `own: [S, k]` int64, which it fills."""
    block_size = len(layout.key_index)
    index = _cells(layout)
    places = torch.arange(own.shape[1] * block_size, device=own.device)
    heads = torch.arange(taken.shape[2], device=own.device)[:, None, None]
    blocks = own[:, None, places // block_size, None]  # [S, 1, K, 1]
    cells = index[places % block_size]  # [K, 2 D]
    rows, columns = cells // caches[0].shape[3], cells % caches[0].shape[3]
    for cache, numbers in zip(caches, raw(taken), strict=True):  # flattened it might be a copy
        raw(cache)[blocks, heads, rows, columns] = numbers


def _cells(layout: BlockLayout) -> Tensor:
    """Return the offsets of a token's keys and values in a head's part of a block, `[bs, 2 D]`."""
    return torch.cat((layout.key_index, layout.value_index), -1)
