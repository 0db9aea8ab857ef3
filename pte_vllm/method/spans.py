"""Half-open ranges in ascending order, of blocks or of tokens, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]
Spans = tuple[Span, ...]
"""Half-open ranges in ascending order. None is empty, and no two touch."""

UNBOUNDED = 2**62
"""A position no sequence reaches."""


def blocks_of(spans: Iterable[Span]) -> list[int]:
    """Return the blocks of the spans one by one, in their order."""
    return [block for first, end in spans for block in range(first, end)]


def runs(blocks: Iterable[int]) -> Spans:
    """Return ascending blocks as spans."""
    found: list[Span] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = found[-1][0], block + 1
        else:
            found.append((block, block + 1))
    return tuple(found)


def without(spans: Spans, evicted: Spans) -> Spans:
    """Return what stays of `spans` when `evicted`, which lies within them, leaves."""
    kept: list[Span] = []
    rest = iter((*evicted, (UNBOUNDED, UNBOUNDED)))
    first_out, end_out = next(rest)
    for begin, end in spans:
        first = begin
        while end_out <= end and first_out < end:
            if first < first_out:
                kept.append((first, first_out))
            first = end_out
            first_out, end_out = next(rest)
        if first < end:
            kept.append((first, end))
    return tuple(kept)
