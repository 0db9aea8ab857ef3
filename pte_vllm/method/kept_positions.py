"""From a record of kept tokens to positions: what each head holds after a fold, and what it lost.

A record has marks of candidates (`keep_marks`). Which tokens the candidates are follows from the
plan and from all folds before: what a head kept, and then the tokens that leave the window.

Letters in shapes: L layers, H KV heads, C candidates, A tokens that are kept after a fold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pte_vllm.method.keep_marks import marks_of_fold
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans


@dataclass(frozen=True, kw_only=True)
class KeptPositions:
    """What one fold left to each KV head, as positions of tokens in the sequence, ascending.

    Each head chooses from `candidates`; `kept` and `dropped` are these, told apart.
    """

    folds: int
    """How many folds lie behind, this one included; 0 is the sequence before any of them."""
    evicted: Spans
    """The tokens that left the window at this fold, so that every head held them before."""
    candidates: Tensor  # [L, H, C] int64
    kept: Tensor  # [L, H, A] int64
    dropped: Tensor  # [L, H, C - A] int64


@dataclass(frozen=True, kw_only=True)
class HeldBy:
    """By how many heads each candidate of a fold is held, before the fold and after it.

    The lists are equally long, and `positions` ascend.
    """

    heads: int
    """How many heads were asked."""
    positions: list[int]
    before: list[int]
    after: list[int]

    @property
    def dropped(self) -> list[int]:
        """The positions that none of the heads holds any more."""
        held = zip(self.positions, self.after, strict=True)
        return [position for position, heads in held if not heads]


def kept_positions(
    record: KeptRecord, plan: FoldPlan, num_layers: int, num_heads: int
) -> Iterator[KeptPositions]:
    """Go through the folds of a record, from the sequence before any of them to the last.

    One fold is unpacked at a time, so that a long record takes no more memory than a short one.

    Raises:
        ValueError: If the record does not fit the plan and the model; the message names the fold.
    """
    size = plan.block_size
    none = torch.empty(num_layers, num_heads, 0, dtype=torch.int64)
    yield KeptPositions(folds=0, evicted=(), candidates=none, kept=none, dropped=none)
    kept = none
    for fold, data in enumerate(record):
        marks = marks_of_fold(data, plan, fold, num_layers, num_heads)
        evicted = tuple((first * size, end * size) for first, end in plan.oldest(fold))
        leaves = torch.cat([torch.arange(*span) for span in evicted])
        leaves = leaves.expand(num_layers, num_heads, -1)
        candidates = torch.cat((kept, leaves), -1)
        if marks is None:
            kept, dropped = candidates, none
        else:  # as many are marked in every row
            kept = candidates[marks].view(num_layers, num_heads, -1)
            dropped = candidates[~marks].view(num_layers, num_heads, -1)
        yield KeptPositions(
            folds=fold + 1, evicted=evicted, candidates=candidates, kept=kept, dropped=dropped
        )


def positions_at(
    record: KeptRecord, plan: FoldPlan, folds: int, num_layers: int, num_heads: int
) -> KeptPositions:
    """Return what is kept after that many folds of a record, at most as many as it has.

    Raises:
        ValueError: If the record is shorter, or does not fit the plan and the model.
    """
    if not 0 <= folds <= len(record):
        raise ValueError(f"a record of {len(record)} folds has no fold {folds}")
    *_, last = kept_positions(record[:folds], plan, num_layers, num_heads)
    return last


def held_by(
    positions: KeptPositions, *, layer: int | None = None, head: int | None = None
) -> HeldBy:
    """Count the heads that hold each candidate of a fold.

    Args:
        positions: Of the fold.
        layer: The layer whose heads are asked; None: all layers.
        head: The KV head that is asked, in each of these layers; None: all heads.
    """
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    candidates = positions.candidates[layers, heads]
    kept = positions.kept[layers, heads]
    found, before = candidates.unique(return_counts=True)
    after = torch.zeros_like(before)
    still, counts = kept.unique(return_counts=True)
    after[torch.searchsorted(found, still)] = counts
    return HeldBy(
        heads=candidates.shape[0] * candidates.shape[1],
        positions=found.tolist(),
        before=before.tolist(),
        after=after.tolist(),
    )
