"""The folds of a conversation: each new question is pinned until the next one begins.

Blocks of the first pinned tokens stay for ever, and those of the newest question that has begun.
All others are thoughts, an earlier question's too once the next one has begun. Before a block is
written, as many folds as are needed leave room for it in the window: each takes the oldest thoughts
that are held, `evict_blocks` of them. So at most two gaps are open at a time: before the newest
question, and after it.

Nothing depends on a question that has not begun, so a turn that comes later changes no fold before
it. Past the last question folds follow each other at a constant distance, and need no list.

    question 0   thoughts, oldest first   question 1   thoughts           a fold takes the oldest,
    ▓▓▓▓▓▓▓▓▓▓▓  ░░░░░░░░░░░░░░░░░░░░░░░  ▓▓▓▓▓▓▓▓▓▓▓  ░░░░░░░░░░         then those past question 1
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

from pte_vllm.method.spans import Span, Spans, runs


@dataclass(frozen=True, kw_only=True)
class TurnFolds:
    """The folds of a plan with several pinned spans: some in a list, and the regular rest."""

    at: tuple[int, ...]
    """The position of the first token after each listed fold; several folds may share one."""
    evicted: tuple[Spans, ...]
    """The blocks that each listed fold takes."""
    rest_at: int
    """The position of the first fold that is not listed; each next one comes a stride later."""
    rest_from: int
    """The first block that it takes; each next one goes on where the one before ended."""

    def count(self, pos: int, stride: int) -> int:
        """Return the number of folds before the token at `pos` is computed."""
        if pos < self.rest_at:
            return bisect_right(self.at, pos)
        return len(self.at) + 1 + (pos - self.rest_at) // stride

    def position(self, fold: int, stride: int) -> int:
        """Return the position of the first token after a fold, counted from 0."""
        if fold < len(self.at):
            return self.at[fold]
        return self.rest_at + (fold - len(self.at)) * stride

    def leaving(self, fold: int, evict_blocks: int) -> Spans:
        """Return the blocks that leave at a fold."""
        if fold < len(self.at):
            return self.evicted[fold]
        first = self.rest_from + (fold - len(self.at)) * evict_blocks
        return ((first, first + evict_blocks),)


def blocks_around(span: Span, block_size: int) -> Span:
    """Return the blocks that hold any token of a span."""
    return span[0] // block_size, -(-span[1] // block_size)


def turn_folds(
    pin_spans: Sequence[Span],
    *,
    pinned_blocks: int,
    window_blocks: int,
    evict_blocks: int,
    block_size: int,
) -> TurnFolds:
    """Go through a sequence block by block until its folds are regular.

    Args:
        pin_spans: The tokens of each question but the first, at least one.
        pinned_blocks: The blocks at the start that always stay.
        window_blocks: The blocks of the window.
        evict_blocks: The blocks that a fold takes.
        block_size: The number of tokens in a block.
    """
    at: list[int] = []
    evicted: list[Spans] = []
    thoughts: list[int] = []  # the full blocks that are held and not pinned, ascending
    newest: Span = (0, 0)  # the blocks of the newest question that has begun
    begun = 0
    block = 0  # that is about to be written
    while begun < len(pin_spans) or not _is_regular(thoughts, block, max(newest[1], pinned_blocks)):
        block += 1
        released: list[int] = []
        while begun < len(pin_spans) and pin_spans[begun][0] <= block * block_size:
            released += range(max(newest[0], pinned_blocks), newest[1])
            newest = blocks_around(pin_spans[begun], block_size)
            begun += 1
        for done in {*released, block - 1}:
            if done < block and not (done < pinned_blocks or newest[0] <= done < newest[1]):
                insort(thoughts, done)
        pinned = block < pinned_blocks or newest[0] <= block < newest[1]
        while len(thoughts) + (not pinned) > window_blocks:
            at.append(block * block_size)
            evicted.append(runs(thoughts[:evict_blocks]))
            del thoughts[:evict_blocks]
    first = thoughts[0] if thoughts else block
    return TurnFolds(
        at=tuple(at),
        evicted=tuple(evicted),
        rest_at=(first + window_blocks) * block_size,
        rest_from=first,
    )


def _is_regular(thoughts: list[int], block: int, pinned_to: int) -> bool:
    """Return whether all that is held past the pinned blocks are the newest blocks in one run."""
    if block < pinned_to:
        return False
    first = thoughts[0] if thoughts else block
    return first >= pinned_to and len(thoughts) == block - first
