"""Counts of folds: totals, and where a value of ρ falls."""

from __future__ import annotations

import pytest
import torch

from pte_vllm.engine.counters import RHO_EDGES, FoldCounters


def test_folds_are_counted_by_rule() -> None:
    counters = FoldCounters(torch.device("cpu"))
    for rule, num_blocks in (("ridge", 2), ("ridge", 1), (None, 4), ("none", 1)):
        counters.add_fold(rule, num_blocks=num_blocks, block_size=16)
    found = counters.snapshot()
    assert found["folds"] == {"ridge": 2, "none": 2}
    assert found["freed_blocks"] == 8 and found["folded_tokens"] == 128


def test_every_rho_has_a_bin() -> None:
    """An edge belongs to the bin below it; what is no number is counted, but not summed."""
    counters = FoldCounters(torch.device("cpu"))
    counters.add_rho(torch.tensor([0.0, RHO_EDGES[0], RHO_EDGES[0] * 1.01]))
    counters.add_rho(torch.tensor([RHO_EDGES[-1], 99.0, float("inf"), float("nan")]))
    found = counters.snapshot()
    bins = [0] * (len(RHO_EDGES) + 1)
    bins[0], bins[1], bins[-2], bins[-1] = 2, 1, 1, 3
    assert found["rho_bins"] == bins
    assert found["rho_sum"] == pytest.approx(RHO_EDGES[0] * 2.01 + RHO_EDGES[-1] + 99.0)
