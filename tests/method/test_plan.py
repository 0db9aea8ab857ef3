"""FoldPlan against a simulation that evicts token by token, and its properties for any values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte_vllm.method.blocks import HeldBlocks, held_spans
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import blocks_of, runs


@st.composite
def plans(draw: st.DrawFn, *, bounded: bool = True, evict: str = "oldest") -> FoldPlan:
    block_size = draw(st.integers(1, 33))
    blocks = draw(st.integers(2, 40)) if bounded else 0
    return FoldPlan(
        pin_tokens=draw(st.integers(0, 100)),
        window_tokens=blocks * block_size,
        evict_ratio=draw(st.floats(0.01, 0.99)),
        block_size=block_size,
        evict=evict,
        evict_seed=draw(st.integers(0, 2**63 - 1)) if evict == "random" else 0,
    )


def _simulate(plan: FoldPlan, num_tokens: int) -> list[int]:
    """Blocks folded before each token, by filling the window and evicting when it is full."""
    folded, history = 0, []
    for pos in range(num_tokens):
        window_start = plan.pinned_blocks + folded
        if pos == (window_start + plan.window_blocks) * plan.block_size:
            folded += plan.evict_blocks
        history.append(folded)
    return history


@given(plans())
def test_folded_blocks_is_what_a_full_window_evicts(plan: FoldPlan) -> None:
    num_tokens = plan.first_fold + 4 * plan.stride + 3
    folded = [plan.folded_blocks(pos) for pos in range(num_tokens)]
    assert folded == _simulate(plan, num_tokens)
    assert folded == sorted(folded)


@given(plans(), st.integers(0, 5000))
def test_next_boundary_is_the_first_position_with_another_gap(plan: FoldPlan, pos: int) -> None:
    boundary = plan.next_boundary(pos)
    assert boundary > pos
    assert boundary % plan.block_size == 0
    assert plan.folds(boundary - 1) == plan.folds(pos)
    assert plan.folds(boundary) == plan.folds(pos) + 1


@given(plans(), st.integers(1, 3000))
def test_segments_cover_every_token_once_under_one_gap_each(plan: FoldPlan, length: int) -> None:
    segments = list(plan.segments(length))
    assert [pos for start, end in segments for pos in range(start, end)] == list(range(length))
    for start, end in segments:
        assert {plan.folds(pos) for pos in (start, (start + end) // 2, end - 1)} == {
            plan.folds(start)
        }


@given(plans(), st.integers(0, 5000))
def test_held_blocks_stay_below_the_peak_and_cover_pinned_and_own(plan: FoldPlan, pos: int) -> None:
    held = plan.held_blocks(pos)
    assert 1 <= held <= plan.peak_blocks(pos + 1)
    assert held <= plan.pinned_blocks + plan.window_blocks
    own, end = pos // plan.block_size, plan.pinned_blocks + plan.folded_blocks(pos)
    seen = [*range(plan.pinned_blocks), *range(end, own + 1)]
    assert held_spans(plan, pos) == (runs(seen) if plan.folds(pos) else ((0, own + 1),))
    assert own >= end or not plan.folds(pos)  # the gap never reaches the token's own block


@given(plans())
def test_a_fold_never_frees_the_whole_window(plan: FoldPlan) -> None:
    assert 1 <= plan.evict_blocks <= plan.window_blocks
    assert plan.stride == plan.evict_blocks * plan.block_size


@given(plans(bounded=False), st.integers(0, 100_000))
def test_without_a_window_nothing_folds(plan: FoldPlan, pos: int) -> None:
    assert not plan.bounded
    assert plan.folded_blocks(pos) == 0
    assert list(plan.segments(pos)) == ([(0, pos)] if pos else [])
    assert plan.held_blocks(pos) == plan.peak_blocks(pos + 1) == pos // plan.block_size + 1


@given(plans(evict="random"), st.integers(0, 40))
def test_random_draws_hold_as_much_as_oldest(plan: FoldPlan, folds: int) -> None:
    """At the same positions; what left never returns, pinned and newest blocks do not leave."""
    oldest = replace(plan, evict="oldest", evict_seed=0)
    held, gone = HeldBlocks(plan), set[int]()
    for fold in range(folds):
        at = plan.first_fold + fold * plan.stride
        newest = at // plan.block_size - 1
        evicted = blocks_of(held.fold_to(fold + 1))
        assert len(set(evicted)) == plan.evict_blocks
        assert not gone.intersection(evicted)
        assert plan.pinned_blocks <= min(evicted) and max(evicted) <= newest
        assert newest not in evicted or plan.evict_blocks == plan.window_blocks
        gone.update(evicted)
    pos = plan.first_fold + folds * plan.stride - 1
    found = blocks_of(held_spans(plan, pos))
    assert found == [block for block in range(pos // plan.block_size + 1) if block not in gone]
    assert len(found) == plan.held_blocks(pos) == oldest.held_blocks(pos)
    assert plan.next_boundary(pos) == oldest.next_boundary(pos)
    again = HeldBlocks(replace(plan), folds)  # nothing is stored in the plan
    assert (again.spans, again.cuts) == (held.spans, held.cuts)
    for blocks in range(0, found[-1] + 2, 3):
        assert held.count(blocks) == blocks - sum(block < blocks for block in gone)
    # What attention makes of it: the block in each place of the table.
    for place, block in enumerate(found):
        left_out = [left for before, left in held.cuts if before <= place]
        assert block == place + (left_out[-1] if left_out else 0)
    held.fold_to(folds // 2)
    assert held.spans == HeldBlocks(plan, folds // 2).spans  # as after a preemption


@given(plans(evict="random"), st.integers(0, 20))
def test_draws_count_from_the_end_of_what_is_pinned(plan: FoldPlan, folds: int) -> None:
    """So that sequences side by side in the replay draw the same columns."""
    shift = 3
    other = replace(plan, pin_tokens=(plan.pinned_blocks + shift) * plan.block_size)
    own, moved = HeldBlocks(plan), HeldBlocks(other)
    for fold in range(1, folds + 1):
        ours, theirs = own.fold_to(fold), moved.fold_to(fold)
        assert theirs == tuple((first + shift, end + shift) for first, end in ours)


def test_draws_stay_what_they_are() -> None:
    """Records tell seeds, and not blocks: another draw would be another sequence."""
    plan = FoldPlan(pin_tokens=33, window_tokens=128, block_size=16, evict="random", evict_seed=7)
    draws = [(1, 3), (0, 3), (2, 6), (1, 3)]
    assert [plan.leaving(fold) for fold in range(4)] == draws
    held = HeldBlocks(plan)
    assert held.fold_to(1) == ((4, 5), (6, 7))
    assert held.fold_to(2) == ((3, 4), (8, 9))
    assert held.fold_to(3) == ((9, 10), (13, 14))
    assert held_spans(plan, 210) == ((0, 3), (5, 6), (7, 8), (9, 14))
    assert held_spans(plan, 250) == ((0, 3), (5, 6), (7, 8), (10, 13), (14, 16))
    other = replace(plan, evict_seed=8)
    assert [other.leaving(fold) for fold in range(4)] != draws
    # In the long run all blocks but the newest leave equally often.
    counts = [sum(i in plan.leaving(fold) for fold in range(3500)) for i in range(8)]
    assert counts[7] == 0 and all(abs(count - 1000) < 100 for count in counts[:7])


def test_worked_example() -> None:
    plan = FoldPlan(pin_tokens=33, window_tokens=128, evict_ratio=0.25, block_size=16)
    assert (plan.pinned_blocks, plan.window_blocks, plan.evict_blocks) == (3, 8, 2)
    assert (plan.first_fold, plan.stride) == (176, 32)
    assert [plan.folded_blocks(p) for p in (0, 175, 176, 207, 208)] == [0, 0, 2, 2, 4]
    assert [plan.next_boundary(p) for p in (0, 175, 176, 207)] == [176, 176, 208, 208]
    assert list(plan.segments(220)) == [(0, 176), (176, 208), (208, 220)]
    assert held_spans(plan, 208) == ((0, 3), (7, 14))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be positive, got 0"),
        ({"pin_tokens": -1}, "pin_tokens must not be negative, got -1"),
        ({"window_tokens": 100}, "window of 100 tokens is not a multiple"),
        ({"window_tokens": -32}, "window of -32 tokens"),
        ({"window_tokens": 16}, "less than two blocks"),
        ({"evict_ratio": 0.0}, "evict ratio must lie in"),
        ({"evict_ratio": 1.0}, "evict ratio must lie in"),
        ({"evict_ratio": float("nan")}, "evict ratio must lie in"),
        ({"evict": "newest"}, "evict must be one of oldest, random, got 'newest'"),
        ({"evict": "random", "window_tokens": 0}, "evict random needs a window"),
        ({"evict_seed": 1}, "evict seed 1 needs evict random"),
        ({"evict": "random", "evict_seed": -1}, r"evict seed must lie in \[0, 2\*\*63\), got -1"),
    ],
)
def test_bad_values_name_the_option(change: dict[str, float], message: str) -> None:
    good = {"pin_tokens": 10, "window_tokens": 64, "evict_ratio": 0.25, "block_size": 16}
    with pytest.raises(ValueError, match=message):
        FoldPlan(**{**good, **change})  # type: ignore[arg-type]
