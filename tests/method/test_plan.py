"""FoldPlan against a simulation that evicts token by token, and its properties for any values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte_vllm.method.plan import FoldPlan


@st.composite
def plans(draw: st.DrawFn, *, bounded: bool = True) -> FoldPlan:
    block_size = draw(st.integers(1, 33))
    blocks = draw(st.integers(2, 40)) if bounded else 0
    return FoldPlan(
        pin_tokens=draw(st.integers(0, 100)),
        window_tokens=blocks * block_size,
        evict_ratio=draw(st.floats(0.01, 0.99)),
        block_size=block_size,
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
    assert plan.gap(boundary - 1) == plan.gap(pos)
    assert plan.gap(boundary) != plan.gap(pos)


@given(plans(), st.integers(1, 3000))
def test_segments_cover_every_token_once_under_one_gap_each(plan: FoldPlan, length: int) -> None:
    segments = list(plan.segments(length))
    assert [pos for start, end in segments for pos in range(start, end)] == list(range(length))
    for start, end in segments:
        assert {plan.gap(pos) for pos in (start, (start + end) // 2, end - 1)} == {plan.gap(start)}


@given(plans(), st.integers(0, 5000))
def test_held_blocks_stay_below_the_peak_and_cover_pinned_and_own(plan: FoldPlan, pos: int) -> None:
    held = plan.held_blocks(pos)
    assert 1 <= held <= plan.peak_blocks(pos + 1)
    assert held <= plan.pinned_blocks + plan.window_blocks
    first, end = plan.gap(pos)
    assert end - first == plan.folded_blocks(pos)
    assert first == plan.pinned_blocks
    own = pos // plan.block_size
    assert own >= end or end == first  # the gap never reaches the token's own block


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


def test_worked_example() -> None:
    plan = FoldPlan(pin_tokens=33, window_tokens=128, evict_ratio=0.25, block_size=16)
    assert (plan.pinned_blocks, plan.window_blocks, plan.evict_blocks) == (3, 8, 2)
    assert (plan.first_fold, plan.stride) == (176, 32)
    assert [plan.folded_blocks(p) for p in (0, 175, 176, 207, 208)] == [0, 0, 2, 2, 4]
    assert [plan.next_boundary(p) for p in (0, 175, 176, 207)] == [176, 176, 208, 208]
    assert list(plan.segments(220)) == [(0, 176), (176, 208), (208, 220)]
    assert plan.gap(208) == (3, 7)


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
    ],
)
def test_bad_values_name_the_option(change: dict[str, float], message: str) -> None:
    good = {"pin_tokens": 10, "window_tokens": 64, "evict_ratio": 0.25, "block_size": 16}
    with pytest.raises(ValueError, match=message):
        FoldPlan(**{**good, **change})  # type: ignore[arg-type]
