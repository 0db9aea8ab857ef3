"""Positions of kept tokens, from records of folds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte_vllm.method.keep_marks import num_candidates, packed_bytes
from pte_vllm.method.kept_positions import held_by, kept_positions, positions_at
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan

LAYERS, HEADS = 3, 2


def _plan(keep_blocks: int, window_blocks: int = 4, evict_ratio: float = 0.25) -> FoldPlan:
    return FoldPlan(
        pin_tokens=5,
        window_tokens=4 * window_blocks,
        evict_ratio=evict_ratio,
        block_size=4,
        keep_tokens=4 * keep_blocks,
    )


def _record(plan: FoldPlan, folds: int, seed: int) -> KeptRecord:
    """Draw what each fold keeps."""
    g = torch.Generator().manual_seed(seed)
    record: list[bytes | None] = []
    for fold in range(folds):
        if not plan.selects(fold):
            record.append(None)
            continue
        scores = torch.rand(LAYERS, HEADS, num_candidates(plan, fold), generator=g)
        kept = scores.topk(plan.keep_tokens, -1).indices
        marks = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, kept, True)
        record.append(packed_bytes(marks))
    return tuple(record)


def test_by_hand() -> None:
    plan = FoldPlan(pin_tokens=1, window_tokens=4, evict_ratio=0.5, block_size=2, keep_tokens=2)
    marks = [[[1, 0, 1, 0], [0, 0, 1, 1]], [[1, 1, 0, 0], [0, 1, 1, 0]]]  # of 2, 3, 4, 5
    record = (None, packed_bytes(torch.tensor(marks, dtype=torch.bool)))
    nothing, first, second = kept_positions(record, plan, 2, 2)
    assert (nothing.folds, nothing.evicted, nothing.kept.shape) == (0, (), (2, 2, 0))
    assert held_by(nothing).positions == [] and held_by(nothing).heads == 4
    assert (first.folds, first.evicted) == (1, ((2, 4),))
    assert first.kept.tolist() == [[[2, 3]] * 2] * 2 and first.dropped.shape == (2, 2, 0)
    assert (second.folds, second.evicted) == (2, ((4, 6),))
    assert second.kept.tolist() == [[[2, 4], [4, 5]], [[2, 3], [3, 4]]]
    assert second.dropped.tolist() == [[[3, 5], [2, 3]], [[4, 5], [2, 5]]]
    everyone = held_by(second)
    assert everyone.positions == [2, 3, 4, 5] and everyone.before == [4] * 4
    assert everyone.after == [2, 2, 3, 1] and everyone.dropped == []
    one = held_by(second, layer=1, head=0)
    assert (one.heads, one.before, one.after, one.dropped) == (1, [1] * 4, [1, 1, 0, 0], [4, 5])
    assert held_by(second, layer=0).after == [1, 0, 2, 1]
    assert held_by(second, head=1).after == [0, 1, 2, 1]


@given(
    st.integers(1, 5), st.integers(2, 5), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 2**31)
)
def test_every_fold_is_what_its_marks_say_of_the_one_before(
    keep_blocks: int, window_blocks: int, evict_ratio: float, seed: int
) -> None:
    plan = _plan(keep_blocks, window_blocks, evict_ratio)
    record = _record(plan, 6, seed)
    held = [set[int]() for _ in range(LAYERS * HEADS)]
    for at in kept_positions(record, plan, LAYERS, HEADS):
        for head, before in enumerate(held):
            row = divmod(head, HEADS)
            kept, dropped = (set(of[row].tolist()) for of in (at.kept, at.dropped))
            assert (
                kept | dropped == before | {p for span in at.evicted for p in range(*span)}
                and not kept & dropped
            )
            assert len(kept) == at.kept.shape[-1] == min(plan.keep_tokens, at.folds * plan.stride)
            assert at.kept[row].tolist() == sorted(kept)
            held[head] = kept
        counted = held_by(at)
        assert [sum(p in kept for kept in held) for p in counted.positions] == counted.after
        # Behind the pinned blocks, and before the window.
        begin = plan.pinned_blocks * plan.block_size
        end = plan.first_fold + (at.folds - 1) * plan.stride - plan.window_tokens + plan.stride
        assert (
            all(begin <= p < end for p in counted.positions)
            and (at.evicted or ((0, begin),))[-1][1] == end
        )
    assert torch.equal(positions_at(record, plan, 6, LAYERS, HEADS).kept, at.kept)


def test_records_that_do_not_fit_are_refused() -> None:
    plan = _plan(keep_blocks=1)
    record = _record(plan, 3, 1)
    with pytest.raises(ValueError, match="a record of 3 folds has no fold 4"):
        positions_at(record, plan, 4, LAYERS, HEADS)
    with pytest.raises(ValueError, match="fold 1: 3 layers, 3 KV heads and 8 candidates"):
        positions_at(record, plan, 2, LAYERS, HEADS + 1)
    with pytest.raises(ValueError, match="fold 1 chooses what it keeps"):
        list(kept_positions((None, None), plan, LAYERS, HEADS))
