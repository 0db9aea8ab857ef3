"""From blocks that sequences leave behind to the tokens that they keep, on whatever device.

A fold that selects reads its candidates from the paged cache, chooses by `method.keep`, and writes
the survivors into blocks of the sequence's own. All folds of a step read before any of them writes,
as a block that one sequence leaves may be another's for kept tokens in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from pte_vllm.adapter.probes import Probes
from pte_vllm.engine.folding import compiled
from pte_vllm.engine.paged import PagedCaches
from pte_vllm.engine.ranks import Ranks
from pte_vllm.engine.sequences import FoldingSequence
from pte_vllm.engine.thoughts import to_host
from pte_vllm.kernels import keep_torch
from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable
from pte_vllm.kernels.choice import use_kernels
from pte_vllm.kernels.keep_cpu import can_keep, expected_scores_cpu, put_cpu, take_cpu
from pte_vllm.kernels.keep_torch import ProbedCache
from pte_vllm.method import keep
from pte_vllm.method.keep_marks import packed, unpacked_on
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import blocks_of

if TYPE_CHECKING:
    from pte_vllm.kernels.cache_triton import CacheTable

BlockIds = Callable[[list[str], list[list[int]]], Tensor]
"""Turns n logical blocks of each of S requests into ids in the cache, `[S, n]` int64."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A fold of one sequence that has more candidates than it may keep."""

    request_id: str
    sequence: FoldingSequence
    fold: int
    """The number of the fold, from 0."""

    @property
    def plan(self) -> FoldPlan:
        """How the sequence folds."""
        return self.sequence.plan

    @property
    def at(self) -> int:
        """The position of the first token after the fold."""
        return self.plan.fold_at(self.fold)

    @property
    def shape(self) -> tuple[str, int, int, int, int]:
        """What selections that are computed together have in common: also whose probes score."""
        plan, own = self.plan, self.probes
        kept_before = plan.kept_blocks(self.fold)
        whose = 0 if own is None else id(own)  # the sequence holds them, so nothing else has it
        return plan.keep_score, plan.keep_blocks, kept_before, plan.evict_blocks, whose

    @property
    def probes(self) -> Tensor | None:
        """The probes of its adapter, if it is scored by these; None: by the engine's, or none."""
        return self.sequence.probes if self.plan.keep_score == "expected" else None

    def candidates(self) -> list[int]:
        """Return the logical blocks of what was kept before and of what leaves, in that order."""
        plan = self.plan
        before = plan.kept_places[: plan.kept_blocks(self.fold)]
        return [*before, *blocks_of(plan.oldest(self.fold))]

    def newest(self) -> list[int]:
        """Return the logical blocks of the newest tokens, as many as leave."""
        end = self.at // self.plan.block_size
        return list(range(end - self.plan.evict_blocks, end))

    def places(self) -> list[int]:
        """Return the logical blocks in whose places the kept tokens lie."""
        return list(self.plan.kept_places)

    def forced(self) -> Tensor | None:
        """Return which candidates it has to keep, as packed marks; None: it chooses."""
        earlier = self.sequence.forced
        return earlier[self.fold] if self.fold < len(earlier) else None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What several selections keep, read and not yet written."""

    own: Tensor
    """The blocks that it goes into, `[S, k]` int64."""
    cells: Tensor
    """`[L, S, H, K, 2 D]` in the cache's dtype."""
    drafted: Tensor | None
    """The same of layers that draft."""


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """The way of kept tokens through a worker's paged cache; it lives as long as the cache does."""

    caches: Sequence[Tensor]
    """Of all layers in their order, each `[blocks, H, bs, 2 D]`."""
    layout: BlockLayout
    ranks: Ranks
    """Those among which the KV heads are shared out: H counts the heads that lie here."""
    probed: ProbedCache | None
    """None where the engine has no probes: then no request may ask for the score `expected`.
    Requests of an adapter that brings probes are scored by those."""
    drafting: Sequence[Tensor] = ()
    """Of the layers of a head that drafts. Drafts are checked, so what they attend to need not be
    theirs: they keep what the model's last layer keeps."""
    table: CacheTable | None = None
    """Where the kernels of a GPU find the caches; None where they do not apply."""

    @classmethod
    def of(
        cls,
        paged: PagedCaches,
        rope: RopeTable | None,
        *,
        ranks: Ranks,
        probes: Probes | None,
        scale: float,
    ) -> KeptTokens:
        """Put the probes on the device of the caches.

        Raises:
            ProbesError: If they are for a model of other sizes.
        """
        layers, layout = sorted(paged.caches), paged.layout
        caches, scales = [paged.caches[i] for i in layers], paged.scales_of(layers)
        probed = None
        if probes is not None:
            probes.check_fits(
                num_layers=len(caches), num_kv_heads=ranks.num_heads, head_dim=ranks.head_dim
            )
            queries = probes.queries[:, ranks.heads].contiguous().to(caches[0].device)
            probed = ProbedCache(queries=queries, rope=rope, scale=scale, scales=scales)
        table = None
        if use_kernels(caches[0].device):
            from pte_vllm.kernels.cache_triton import CacheTable
            from pte_vllm.kernels.fold_triton import unusable

            if unusable(caches, layout, rank=1) is None:
                table = CacheTable.of(caches, scales)
        return cls(
            caches=tuple(caches),
            layout=layout,
            ranks=ranks,
            probed=probed,
            drafting=paged.drafting,
            table=table,
        )

    @torch.inference_mode()
    def keep(
        self, folds: list[Selection], block_ids: BlockIds, moved: dict[str, list[int]]
    ) -> None:
        """Choose what stays of what folds leave, where that is more than may stay.

        Args:
            folds: Folds of sequences that keep tokens.
            block_ids: What says where the logical blocks of a request are, before this step.
            moved: The blocks for kept tokens of each request that got others in this step.
        """
        alike: dict[tuple[str, int, int, int, int], list[Selection]] = {}
        for selection in folds:
            if selection.plan.selects(selection.fold):
                alike.setdefault(selection.shape, []).append(selection)
            else:
                selection.sequence.survivals.append(None)
        taken = [self._taken(group, block_ids, moved) for group in alike.values()]
        for cells in taken:
            self._put(cells)

    def _taken(
        self, alike: list[Selection], block_ids: BlockIds, moved: dict[str, list[int]]
    ) -> Taken:
        """Choose what S sequences keep, all of one shape, note it in them, and read it.

        Nothing waits for the device.
        """
        names = [s.request_id for s in alike]
        candidates = block_ids(names, [s.candidates() for s in alike])
        kept = self._choose(alike, candidates, block_ids)
        marks = keep.survival(kept, candidates.shape[1] * len(self.layout.key_index))
        # Memory of its own for each, as one may be remembered much longer than the others.
        for selection, record in zip(alike, packed(marks.transpose(0, 1)), strict=True):
            selection.sequence.survivals.append(to_host(record))
        cells = self._take(candidates, kept)
        drafted = None
        if self.drafting:
            last = kept[-1:].expand(len(self.drafting), *kept.shape[1:])
            drafted = keep_torch.take(self.drafting, self.layout, candidates, last)
        own = block_ids(names, [s.places() for s in alike])
        for i, name in enumerate(names):
            if name in moved:
                own[i] = async_tensor_h2d(moved[name], device=own.device, dtype=own.dtype)
        return Taken(own=own, cells=cells, drafted=drafted)

    def _put(self, taken: Taken) -> None:
        """Write what was taken; every fold of the step has read by now."""
        if self.table is not None:
            from pte_vllm.kernels.keep_triton import put_triton

            put_triton(self.table, taken.own, taken.cells)
        elif (library := self._library()) is not None:
            put_cpu(library, self.caches, self.layout, taken.own, taken.cells)
        else:
            keep_torch.put(self.caches, self.layout, taken.own, taken.cells)
        if taken.drafted is not None:
            keep_torch.put(self.drafting, self.layout, taken.own, taken.drafted)

    def _choose(self, alike: list[Selection], candidates: Tensor, block_ids: BlockIds) -> Tensor:
        """Return which candidates stay, `[L, S, H, K]` int64."""
        keep_tokens, device = alike[0].plan.keep_tokens, candidates.device
        num_candidates = candidates.shape[1] * len(self.layout.key_index)
        forced = [s.forced() for s in alike]
        kept = None
        if any(marks is None for marks in forced):
            kept = keep.best(self._scores(alike, candidates, block_ids), keep_tokens)
        rows = []
        for i, marks in enumerate(forced):
            if marks is None:
                assert kept is not None
                rows.append(kept[:, i])
            else:
                bits = marks.to(device, non_blocking=True)
                sizes = len(self.caches), self.caches[0].shape[1]
                rows.append(keep.places(unpacked_on(bits, *sizes, num_candidates), keep_tokens))
        return torch.stack(rows, 1)

    def _scores(self, alike: list[Selection], candidates: Tensor, block_ids: BlockIds) -> Tensor:
        """Score the candidates, `[L, S, H, C]`."""
        device = candidates.device
        if alike[0].plan.keep_score == "random":
            numbers = [[s.plan.evict_seed, s.fold] for s in alike]
            seeds, folds = async_tensor_h2d(numbers, device=device, dtype=torch.int64).T
            layers = torch.arange(len(self.caches), device=device)
            num_candidates = candidates.shape[1] * len(self.layout.key_index)
            # Drawn for all heads, so that the ranks share out what one rank would draw.
            sizes = self.ranks.num_heads, num_candidates
            return keep.random_scores(seeds, folds, layers, *sizes)[:, :, self.ranks.heads]
        assert self.probed is not None, "checked with the request"
        newest = block_ids([s.request_id for s in alike], [s.newest() for s in alike])
        fold_at = async_tensor_h2d([s.at for s in alike], device=device, dtype=torch.int64)
        own = alike[0].probes
        probed = self.probed if own is None else replace(self.probed, queries=own)
        where = probed, candidates, newest, fold_at
        if self.table is not None:
            from pte_vllm.kernels.keep_triton import expected_scores_triton

            return expected_scores_triton(self.table, *where)
        if (library := self._library()) is not None:
            return expected_scores_cpu(library, self.caches, self.layout, *where)
        return keep_torch.expected_scores(self.caches, self.layout, *where)

    def _take(self, candidates: Tensor, kept: Tensor) -> Tensor:
        if self.table is not None:
            from pte_vllm.kernels.keep_triton import take_triton

            return take_triton(self.table, candidates, kept)
        if (library := self._library()) is not None:
            return take_cpu(library, self.caches, self.layout, candidates, kept)
        return keep_torch.take(self.caches, self.layout, candidates, kept)

    def _library(self) -> CDLL | None:
        return compiled() if can_keep(self.caches) else None
