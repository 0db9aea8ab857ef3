"""What a worker has done since it started, counted without waiting for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

RHO_EDGES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0)
"""Upper edges of the histogram of ρ; a last bin has what is above, or is not a number."""


class FoldCounters:
    """Counts of folds by rule and of what they freed, and a histogram of ρ = ‖ΔS‖/‖S‖.

    The histogram lives on the device and has a fixed size: a fold queues a few small kernels,
    and only `snapshot` waits.

    Args:
        device: The device on which ρ is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.folds: Counter[str] = Counter()
        self.folded_tokens = 0
        self.freed_blocks = 0
        self._edges = torch.tensor(RHO_EDGES, device=device)  # [E]
        self._rho_bins = torch.zeros(len(RHO_EDGES) + 1, dtype=torch.int64, device=device)
        self._rho_sum = torch.zeros((), dtype=torch.float64, device=device)

    def add_fold(self, rule: str | None, *, num_blocks: int, block_size: int) -> None:
        """Count a fold of `num_blocks` blocks; `rule` is None for a sequence without a state."""
        self.folds[rule or "none"] += 1
        self.freed_blocks += num_blocks
        self.folded_tokens += num_blocks * block_size

    def add_rho(self, rho: Tensor) -> None:
        """Add `rho: [n]`, the ρ of each layer of one or several folds, to the histogram."""
        bins = torch.bucketize(rho, self._edges)  # an edge belongs to the bin below it
        self._rho_bins.index_add_(0, bins, torch.ones_like(bins))
        self._rho_sum += rho.nan_to_num(posinf=0.0).sum()

    def snapshot(self) -> dict[str, Any]:
        """Return all counts since the start as plain numbers; waits for the device."""
        return {
            "folds": dict(self.folds),
            "folded_tokens": self.folded_tokens,
            "freed_blocks": self.freed_blocks,
            "rho_bins": self._rho_bins.tolist(),
            "rho_sum": self._rho_sum.item(),
        }
