"""One fold of a replay after another: what leaves the cache, and what becomes of it.

Shapes: B sequences in T columns (`AlignedBatch`), L layers with an encoder, H KV heads, D head
size, m evicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.spans import Spans, blocks_of, runs
from pte_vllm.models.rope_check import undo_rope
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.fold_chain import ThoughtStates
from pte_vllm.train.replay.keeping import Keeping, Kept
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Fold
from pte_vllm.train.replay.window_cache import WindowCache


class Folding:
    """The folds of one replay.

    Args:
        memory: The thought states that evicted tokens are folded into; None without an encoder.
        keeping: Chooses which of them stay; None where the plan keeps none.
    """

    def __init__(
        self,
        model: PTEModel,
        batch: AlignedBatch,
        memory: ThoughtStates | None,
        keeping: Keeping | None,
    ) -> None:
        self._model, self._batch = model, batch
        self._memory, self._keeping = memory, keeping
        self.held = HeldBlocks(batch.plan)
        """The blocks in the cache, counted in columns."""

    def fold(self, cache: WindowCache, start: int) -> dict[int, Fold]:
        """Fold once, before column `start`, and drop from the cache what leaves.

        Returns:
            What the fold was for each sequence that goes on, by its number.
        """
        batch, plan = self._batch, self._batch.plan
        number, size = self.held.folds, plan.block_size
        # The cache holds these blocks in this order; a place for kept tokens counts as its block.
        *earlier, (newest, _) = self.held.spans
        before = blocks_of([*earlier, (newest, start // size)])
        place_of = {block: place for place, block in enumerate(before)}
        spans = self.held.fold_to(number + 1)
        leaves = blocks_of(spans)
        places = _tokens(runs(place_of[block] for block in leaves), size)
        rho = self._encode(cache, places, spans)
        kept = None
        if self._keeping is None:
            cache.drop(places)
        elif plan.selects(number):
            own = {block: len(before) + i for i, block in enumerate(plan.kept_places)}
            chosen_from = [*plan.kept_places[: plan.kept_blocks(number)], *leaves]
            candidates = self._columns([place_of[block] for block in chosen_from])
            kept = self._keeping.choose(cache, candidates, number, start)
            stays = (block for block in before if block in own or block not in leaves)
            order = self._columns([own.get(block, place_of[block]) for block in stays])
            cache.select(candidates, kept.places, order)
        going_on = batch.left + batch.lengths > start
        return {
            b: self._record(b, number, start, spans, rho[:, b], kept)
            for b in going_on.nonzero()[:, 0].tolist()
        }

    def _columns(self, blocks: Sequence[int]) -> Tensor:
        """Return the places of the tokens of blocks one by one, `[n]` int64."""
        size, device = self._batch.plan.block_size, self._batch.ids.device
        first = torch.tensor(blocks, device=device)[:, None] * size
        return (first + torch.arange(size, device=device)).flatten()

    def _encode(self, cache: WindowCache, places: Spans, spans: Spans) -> Tensor:
        """Fold tokens in `places` of the cache, blocks `spans`, into the states; returns ρ."""
        batch, model = self._batch, self._model
        if self._memory is None or not model.layers:
            return torch.zeros(0, len(batch.ids))
        columns = [torch.arange(*span) for span in _tokens(spans, batch.plan.block_size)]

        def encoded(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            positions = torch.cat(columns).to(k.device)[None] - batch.left[:, None]
            return _as_encoded(model, k, positions), v.float().flatten(-2)

        return self._memory.fold(*cache.tokens(places, model.layers), encoded)

    def _record(
        self, b: int, number: int, start: int, spans: Spans, rho: Tensor, kept: Kept | None
    ) -> Fold:
        """Say what a fold before column `start` was for sequence `b`, in its own positions."""
        shift = int(self._batch.left[b])
        blocks = shift // self._batch.plan.block_size
        own = tuple((first - blocks, end - blocks) for first, end in spans)
        if kept is None:
            return Fold(at=start - shift, spans=own, rho=rho)
        assert self._keeping is not None
        forced = self._keeping.forced(b, number) is not None
        return Fold(
            at=start - shift,
            spans=own,
            rho=rho,
            marks=kept.marks[:, b],
            agreement=kept.agreement[b] if forced else None,
        )


def _tokens(spans: Spans, block_size: int) -> Spans:
    return tuple((first * block_size, end * block_size) for first, end in spans)


def _as_encoded(model: PTEModel, k: Tensor, positions: Tensor) -> Tensor:
    """Turn cached keys `[L, B, m, H, D]` at `positions: [B, m]` into K_e `[L, B, m, d_kv]`."""
    assert model.config is not None
    if model.config.keys == "rotated":
        return k.float().flatten(-2)
    return undo_rope(model.base, k, positions).flatten(-2)
