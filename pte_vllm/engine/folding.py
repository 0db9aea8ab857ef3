"""From blocks that sequences leave behind to their thought states, on whatever device.

Compiled code goes from the paged cache to the sums that a fold adds: `kernels.fold_triton` on a
GPU, `kernels.fold_cpu` on a CPU. Where neither applies, `kernels.cache_layout` reads keys and
values first. So it is under tensor parallelism, where ranks add up what they project in between.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger

from pte_vllm.engine.paged import PagedCaches
from pte_vllm.engine.ranks import Ranks
from pte_vllm.engine.sequences import FoldingSequence, LoadedEncoder
from pte_vllm.engine.state import StatePool
from pte_vllm.kernels import native
from pte_vllm.kernels.cache_layout import RopeTable, read_evicted
from pte_vllm.kernels.choice import use_kernels
from pte_vllm.kernels.fold_cpu import can_fold, moments_cpu
from pte_vllm.method.reference import UPDATE_RULES, Moments, multiply

if TYPE_CHECKING:
    from pte_vllm.kernels.cache_triton import CacheTable

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_MAX_COPY_BYTES = 2**29
"""The most memory for keys and values in fp32 at once, on a GPU without the kernel."""


@cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled code of a CPU, if there is any; why not, LoRA has said at start."""
    try:
        return native.load()
    except native.NativeError:
        return None


@dataclass
class EvictedBlocks:
    """The way from a worker's paged cache to folds; it lives as long as the cache does."""

    paged: PagedCaches
    rope: RopeTable | None
    """The model's; None where it has no rotary embedding."""
    ranks: Ranks
    """Those among which the KV heads are shared out."""
    _tables: dict[tuple[tuple[int, ...], int], CacheTable | None] = field(default_factory=dict)
    _warm: set[tuple[int, str, bool, bool]] = field(default_factory=set)

    @torch.inference_mode()
    def fold_into(
        self,
        pool: StatePool,
        sequences: list[FoldingSequence],
        block_ids: Tensor,
        positions: Tensor,
    ) -> None:
        """Fold once for S sequences of one adapter and one rule; nothing waits for the device.

        Args:
            pool: The pool that holds the states of these sequences.
            sequences: The S sequences that fold.
            block_ids: The n blocks that each folds, in token order, `[S, n]` int64 on the device.
            positions: The position of the first token of each of these blocks, `[S, n]` int64 on
                the device.
        """
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        alone = self.ranks.size == 1
        evicted = self._moments(loaded, rule, block_ids, positions) if alone else None
        if evicted is not None:
            pool.fold_moments(sequences, evicted)
            return
        caches, rope = self._caches_of(loaded), self._rope_for(loaded)
        at_once = len(sequences)
        if block_ids.device.type == "cuda":
            block_size, width = caches[0].shape[2:]
            per_token = len(caches) * caches[0].shape[1] * width * 4
            at_once = max(1, _MAX_COPY_BYTES // (per_token * block_size * block_ids.shape[1]))
        for start in range(0, len(sequences), at_once):
            part = slice(start, start + at_once)
            k_e, v_e = read_evicted(
                *(caches, self.paged.layout, block_ids[part], positions[part], rope),
                self.paged.scales_of(loaded.layers),
            )
            pool.fold_projected(sequences[part], *self._projected(loaded, k_e, v_e))

    def _projected(self, loaded: LoadedEncoder, k_e: Tensor, v_e: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply `[L, S, m, d_kv]`, the numbers of the heads here, and add up over the ranks."""
        encoder = loaded.narrowed or loaded.encoder
        k, v = multiply(encoder.map(lambda t: t[:, None]), k_e, v_e)
        if self.ranks.size == 1:
            return k, v
        k, v = self.ranks.sum(torch.cat([k, v], -1)).chunk(2, -1)
        return k, v

    def _moments(
        self, loaded: LoadedEncoder, rule: str, block_ids: Tensor, positions: Tensor
    ) -> Moments | None:
        """Compute the sums by compiled code, `[L, S, r, r]`; None where none applies."""
        rope, with_kk = self._rope_for(loaded), UPDATE_RULES[rule].reads_kk
        table = self._table(loaded)
        if table is not None:
            from pte_vllm.kernels.fold_triton import evicted_moments

            return evicted_moments(
                table, loaded.encoder, block_ids, positions, rope, with_kk=with_kk
            )
        caches = self._caches_of(loaded)
        library = compiled() if can_fold(caches, loaded.config.rank) else None
        if library is None:
            return None
        return moments_cpu(
            *(library, caches, self.paged.layout, block_ids, positions, rope, loaded.encoder),
            with_kk=with_kk,
            scales=self.paged.scales_of(loaded.layers),
        )

    def _caches_of(self, loaded: LoadedEncoder) -> list[Tensor]:
        return [self.paged.caches[layer] for layer in loaded.layers]

    def warm_up(self, loaded: LoadedEncoder, rule: str) -> None:
        """Compile the kernel for an adapter before its first fold, which would wait seconds."""
        reads_kk, rope = UPDATE_RULES[rule].reads_kk, self._rope_for(loaded)
        kind = loaded.config.rank, loaded.config.features, reads_kk, rope is None
        if rule == "none" or kind in self._warm:
            return
        self._warm.add(kind)
        table = self._table(loaded) if self.ranks.size == 1 else None
        if table is not None:
            from pte_vllm.kernels.fold_triton import evicted_moments

            zero = torch.zeros_like(self.paged.layout.key_index[:1, :1])  # vLLM's null block
            evicted_moments(table, loaded.encoder, zero, zero, rope, with_kk=reads_kk)

    def _rope_for(self, loaded: LoadedEncoder) -> RopeTable | None:
        return self.rope if loaded.config.keys == "unrotated" else None

    def _table(self, loaded: LoadedEncoder) -> CacheTable | None:
        """Return the kernel's table of the adapter's caches; None if the kernel does not apply."""
        key = tuple(loaded.layers), loaded.config.rank
        if key not in self._tables:
            self._tables[key] = self._make_table(*key)
        return self._tables[key]

    def _make_table(self, layers: tuple[int, ...], rank: int) -> CacheTable | None:
        if not use_kernels(self.paged.layout.key_index.device):
            return None
        from pte_vllm.kernels.cache_triton import CacheTable
        from pte_vllm.kernels.fold_triton import unusable

        caches = [self.paged.caches[layer] for layer in layers]
        reason = unusable(caches, self.paged.layout, rank)
        if reason is not None:
            logger.warning("Folds go through torch, which is slower: %s", reason)
            return None
        return CacheTable.of(caches, self.paged.scales_of(layers))
