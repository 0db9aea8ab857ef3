"""Which blocks a sequence holds after each of its folds: the folds of a plan, added up.

Cache manager, attention, folding and replay read the blocks from here as lists of spans, whatever
the plan evicts. A span is a half-open range of logical blocks; block i holds the tokens
`[i * block_size, (i + 1) * block_size)`.

Kept tokens (`method.keep`) lie in the places of the first blocks that were evicted; in a plan
without later questions these are the ones right after the pinned blocks. So a place that is held
there is no longer the block of that number.
"""

from __future__ import annotations

from collections.abc import Sequence

from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import UNBOUNDED, Span, Spans, blocks_of, runs, without

_ALL: Spans = ((0, UNBOUNDED),)


class HeldBlocks:
    """The blocks that one sequence holds, carried along from fold to fold.

    It keeps what is held after one fold, not a history: its memory is O(window), and so is the
    time that a fold takes. With `oldest` both are constant.

    Args:
        plan: How the sequence folds.
        folds: After how many folds to begin. A random plan draws all of them one after another.
    """

    def __init__(self, plan: FoldPlan, folds: int = 0) -> None:
        self._plan = plan
        self._places = frozenset(plan.kept_places)
        self.folds = 0
        """How many folds lie behind."""
        self.spans: Spans = _ALL
        """The blocks that are held; the last span has no end, as the sequence grows into it."""
        self.cuts: Spans = ()
        """A pair for each gap: the blocks held before it, and all blocks left out up to its end.
        The block in place p of the held ones is p plus the latter of the last gap at or before p.
        """
        self.fold_to(folds)

    def fold_to(self, folds: int) -> Spans:
        """Go to another fold, and return what leaves the window on the way there, fold by fold.

        Of what leaves, places for kept tokens stay held; `freed` leaves them out. A sequence that
        starts over goes back; what leaves then counts from its start.
        """
        if folds == self.folds:
            return ()
        if folds < self.folds:
            self.folds, self.spans = 0, _ALL
        evicted: Spans = ()
        if self._plan.turns is not None:
            for fold in range(self.folds, folds):
                leaves = self._plan.oldest(fold)
                self.spans = without(self.spans, self.freed(leaves))
                evicted += leaves
        elif self._plan.evict == "oldest":
            first, step = self._plan.pinned_blocks, self._plan.evict_blocks
            if folds:
                evicted = ((first + self.folds * step, first + folds * step),)
                self.spans = without(self.spans, self.freed(evicted))
        else:
            for fold in range(self.folds, folds):
                drawn = self._drawn(fold)
                self.spans = without(self.spans, drawn)
                evicted += drawn
        self.folds = folds
        self.cuts = _cuts(self.spans)
        return evicted

    def freed(self, evicted: Spans) -> Spans:
        """Return what of `evicted` is no place for kept tokens."""
        if self._plan.turns is not None:
            return runs(block for block in blocks_of(evicted) if block not in self._places)
        places = self._plan.pinned_blocks + self._plan.keep_blocks
        spans = ((max(first, places), end) for first, end in evicted)
        return tuple((first, end) for first, end in spans if first < end)

    def _drawn(self, fold: int) -> Spans:
        plan = self._plan
        begin = plan.pinned_blocks
        boundary = begin + plan.window_blocks + fold * plan.evict_blocks
        window = blocks_of((max(first, begin), min(end, boundary)) for first, end in self.spans)
        return runs(window[i] for i in plan.leaving(fold))

    def count(self, blocks: int) -> int:
        """Return how many of the first `blocks` blocks of the sequence are held."""
        left_out = self._plan.evict_blocks * self.folds - self._plan.kept_blocks(self.folds)
        if not left_out or blocks >= self.spans[-1][0]:
            return blocks - left_out
        return sum(max(0, min(end, blocks) - first) for first, end in self.spans)


def held_spans(plan: FoldPlan, pos: int) -> Spans:
    """Return the blocks that the token at `pos` attends to, its own included.

    All folds of a random plan up to `pos` are drawn for it; `HeldBlocks` goes on from the last.
    """
    *before, (first, _) = HeldBlocks(plan, plan.folds(pos)).spans
    return (*before, (first, pos // plan.block_size + 1))


def _cuts(spans: Sequence[Span]) -> Spans:
    held = left_out = 0
    cuts: list[Span] = []
    for first, end in spans:
        if first > held + left_out:
            left_out = first - held
            cuts.append((held, left_out))
        held += end - first
    return tuple(cuts)
