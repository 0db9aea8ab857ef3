"""Plans of conversations: which folds there are, and what they leave, beside a plain simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte_vllm.method.blocks import HeldBlocks, blocks_of, held_spans
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans

BLOCK = 4


@st.composite
def plans(draw: st.DrawFn) -> FoldPlan:
    pin_tokens = draw(st.integers(0, 3 * BLOCK))
    spans, at = [], pin_tokens
    for _ in range(draw(st.integers(1, 5))):
        first = at + draw(st.integers(0, 12 * BLOCK))
        at = first + draw(st.integers(1, 4 * BLOCK))
        spans.append((first, at))
    return FoldPlan(
        pin_tokens=pin_tokens,
        window_tokens=draw(st.integers(2, 8)) * BLOCK,
        evict_ratio=draw(st.sampled_from([0.25, 0.5, 0.9])),
        block_size=BLOCK,
        keep_tokens=draw(st.integers(0, 4)) * BLOCK,
        pin_spans=tuple(spans),
    )


def simulate(plan: FoldPlan, num_tokens: int) -> list[tuple[int, list[int]]]:
    """Fold token by token: at which position which blocks leave, by the words of `turns.py`."""
    gone: set[int] = set()
    folds = []
    for pos in range(num_tokens):
        if pos % BLOCK:
            continue
        pinned = set(range(-(-plan.pin_tokens // BLOCK)))
        begun = [span for span in plan.pin_spans if span[0] <= pos]
        if begun:
            pinned |= {token // BLOCK for token in range(*begun[-1])}
        block = pos // BLOCK
        while True:
            thoughts = [b for b in range(block) if b not in pinned | gone]
            if len(thoughts) + (block not in pinned) <= plan.window_blocks:
                break
            folds.append((pos, thoughts[: plan.evict_blocks]))
            gone |= set(folds[-1][1])
    return folds


@given(plans())
def test_folds_are_those_of_a_plain_simulation(plan: FoldPlan) -> None:
    num_tokens = plan.pin_spans[-1][1] + 20 * BLOCK
    folds = simulate(plan, num_tokens)
    assert [plan.fold_at(i) for i in range(len(folds))] == [at for at, _ in folds]
    assert [blocks_of(plan.oldest(i)) for i in range(len(folds))] == [gone for _, gone in folds]
    for pos in range(num_tokens):
        behind = [at for at, _ in folds if at <= pos]
        assert plan.folds(pos) == len(behind)
        assert plan.is_boundary(pos) == (pos in behind)
    ends = {at for at, _ in folds}
    assert {end for _, end in plan.segments(num_tokens)} == ends | {num_tokens}


@given(plans())
def test_what_is_held_is_bounded(plan: FoldPlan) -> None:
    """Blocks and gaps: at most two gaps beside those between places of kept tokens."""
    num_tokens = plan.pin_spans[-1][1] + 20 * BLOCK
    gone = {block for _, blocks in simulate(plan, num_tokens) for block in blocks}
    if plan.folded_blocks(num_tokens - 1) >= plan.keep_blocks:
        assert set(plan.kept_places) <= gone
    held = HeldBlocks(plan)
    for pos in range(num_tokens):
        held.fold_to(plan.folds(pos))
        spans = held_spans(plan, pos)
        count = sum(end - first for first, end in spans)
        assert count == plan.held_blocks(pos) == held.count(pos // BLOCK + 1)
        assert count <= plan.peak_blocks(num_tokens)
        if not plan.keep_tokens:
            assert len(spans) <= 3


@given(plans())
def test_a_later_turn_changes_nothing_before_it(plan: FoldPlan) -> None:
    if len(plan.pin_spans) < 2:
        return
    before = replace(plan, pin_spans=plan.pin_spans[:-1])
    for pos in range(plan.pin_spans[-1][0]):
        assert held_spans(plan, pos) == held_spans(before, pos)


def test_the_newest_question_stays_and_older_ones_leave() -> None:
    plan = FoldPlan(
        pin_tokens=4,
        window_tokens=16,
        evict_ratio=0.25,
        block_size=4,
        pin_spans=((24, 32), (60, 64)),
    )
    assert held_spans(plan, 23) == ((0, 1), (2, 6))  # a fold at 20, as without questions
    assert held_spans(plan, 31) == ((0, 1), (2, 8))  # the question takes none of the window
    assert held_spans(plan, 51) == ((0, 1), (6, 8), (9, 13))  # thoughts left before and after it
    assert held_spans(plan, 59) == ((0, 1), (6, 8), (11, 15))
    # Where the next one begins it is a thought, so that two folds follow each other.
    assert held_spans(plan, 60) == ((0, 1), (11, 16))
    assert plan.folds(60) - plan.folds(59) == 2


@pytest.mark.parametrize(
    ("pin_tokens", "pin_spans", "message"),
    [
        (8, ((4, 12),), "begins too early"),
        (8, ((12, 12),), "is empty"),
        (8, ((12, 16), (14, 20)), "begins too early"),
        (8, ((20, 24), (12, 16)), "begins too early"),
    ],
)
def test_bad_spans_are_refused(pin_tokens: int, pin_spans: Spans, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoldPlan(pin_tokens=pin_tokens, window_tokens=16, block_size=4, pin_spans=pin_spans)


def test_full_attention_has_no_spans() -> None:
    with pytest.raises(ValueError, match="full attention"):
        FoldPlan(pin_tokens=8, window_tokens=0, block_size=4, pin_spans=((12, 16),))
