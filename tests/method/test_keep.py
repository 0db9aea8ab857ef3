"""Kept tokens: scores against their definition written out, choices, and draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte_vllm.method import keep
from pte_vllm.method.blocks import HeldBlocks, held_spans
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.rope import rotate, unrotate
from pte_vllm.method.spans import blocks_of


def test_expected_scores_are_shares_of_attention_times_norms() -> None:
    g = torch.Generator().manual_seed(0)
    probes, keys, values, newest = (torch.randn(2, n, 8, generator=g) for n in (5, 7, 7, 3))
    found = keep.expected_scores(probes, keys, values, newest, 0.3)
    for head in range(2):
        for c in range(7):
            squares = []
            for q in probes[head]:
                weights = [math.exp(0.3 * float(q @ k)) for k in (*keys[head], *newest[head])]
                squares.append((weights[c] / sum(weights)) ** 2)
            score = math.sqrt(sum(squares) / 5) * float(values[head, c].norm())
            assert float(found[head, c]) == pytest.approx(score, rel=1e-5)


def test_the_best_stay_in_the_order_of_their_positions() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    kept = keep.best(scores, 3)
    assert kept.tolist() == [[1, 2, 3], [0, 1, 2]]  # of equal ones the earlier
    marks = keep.survival(kept, 5)
    assert marks.tolist() == [[False, True, True, True, False], [True, True, True, False, False]]
    assert torch.equal(keep.places(marks, 3), kept)


def test_probes_stand_soon_after_the_fold() -> None:
    positions = keep.probe_positions(torch.tensor([100, 1000]), 8, 1100)
    assert positions[0].tolist() == [100, 108, 124, 148, 196, 260, 100, 108]
    assert positions[1].tolist() == [1000, 1008, 1024, 1048, 1096, 1099, 1000, 1008]


def test_draws_are_even_and_differ() -> None:
    seeds, folds = torch.tensor([7, 7, 2**62 + 1]), torch.tensor([0, 1, 0])
    scores = keep.random_scores(seeds, folds, torch.arange(4), 3, 1000)
    assert scores.shape == (4, 3, 3, 1000)
    assert abs(float(scores.mean()) - 0.5) < 0.01 and abs(float(scores.std()) - 12**-0.5) < 0.01
    assert float(scores.min()) >= 0 and float(scores.max()) < 1
    flat = scores.flatten(0, 2)
    pairs = (flat[:, None] == flat[None]).float().mean(-1)
    assert torch.equal(pairs, torch.eye(len(flat)))
    # Records tell the seed: another draw would be another sequence.
    first = keep.random_scores(seeds[:1], folds[:1], torch.tensor([2]), 1, 3).flatten()
    assert torch.equal(first, scores[2, 0, 0, :3])


def test_rotating_is_undone_by_unrotating() -> None:
    g = torch.Generator().manual_seed(1)
    q, angle = torch.randn(5, 3, 8, generator=g), torch.rand(5, 1, 3, generator=g) * 6
    turned = rotate(q, angle.cos(), angle.sin())
    assert torch.allclose(unrotate(turned, angle[:, 0].cos(), angle[:, 0].sin()), q, atol=1e-5)
    assert torch.equal(turned[..., 6:], q[..., 6:])


@given(
    st.integers(2, 12), st.integers(1, 11), st.integers(1, 20), st.integers(0, 3), st.integers(0, 9)
)
def test_places_for_kept_tokens(
    window: int, evict: int, keeps: int, pinned: int, folds: int
) -> None:
    """They are the first blocks of the gap; as many are held as a plan without them, and those."""
    bs = 4
    sizes = {"pin_tokens": pinned * bs, "window_tokens": window * bs, "block_size": bs}
    ratio = min(evict, window - 1) / window
    plan = FoldPlan(**sizes, evict_ratio=ratio, keep_tokens=keeps * bs)
    plain = FoldPlan(**sizes, evict_ratio=ratio)
    evict = plan.evict_blocks
    pos = plan.first_fold + folds * plan.stride - 1
    kept = min(keeps, folds * evict)
    assert plan.kept_blocks(folds) == kept
    found = blocks_of(held_spans(plan, pos))
    assert found == sorted({*blocks_of(held_spans(plain, pos)), *range(pinned, pinned + kept)})
    assert len(found) == plan.held_blocks(pos) <= plan.peak_blocks(pos + 1)
    assert plan.peak_blocks(10**6) == plain.peak_blocks(10**6) + keeps
    held, gone = HeldBlocks(plan), []
    for fold in range(folds):
        assert plan.selects(fold) == (min(keeps, fold * evict) + evict > keeps)
        gone += blocks_of(held.freed(held.fold_to(fold + 1)))
    assert sorted([*gone, *found]) == list(range(pos // bs + 1))
    assert held.count(pos // bs + 1) == len(found)
    for place, block in enumerate(found):
        left_out = [left for before, left in held.cuts if before <= place]
        assert block == place + (left_out[-1] if left_out else 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_tokens": 24}, "not a multiple of the KV cache's block size, 16"),
        ({"keep_tokens": -16}, "not a multiple"),
        ({"keep_tokens": 16, "window_tokens": 0}, "keep needs a window"),
        ({"keep_tokens": 16, "evict": "random"}, "keep needs evict oldest"),
        ({"keep_score": "best"}, "keep score must be one of expected, random"),
        ({"evict_seed": 3}, "needs evict random or keep score random"),
    ],
)
def test_plans_that_keep_wrongly_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoldPlan(**{"pin_tokens": 5, "window_tokens": 64, "block_size": 16, **fields})
