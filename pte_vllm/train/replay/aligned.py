"""Sequences of different lengths, aligned so that every fold boundary coincides.

A sequence is moved right by whole blocks until its pinned part ends where the longest one ends;
from there on all boundaries lie in the same columns. Columns count from 0 over the padded batch;
token t of sequence b stands in column `left[b] + t`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans


@dataclass(frozen=True, kw_only=True)
class AlignedBatch:
    """B sequences side by side in T columns, with the one plan that they then share."""

    ids: Tensor  # [B, T] int64, 0 where there is no token
    left: Tensor  # [B] columns before each sequence, a multiple of the block size
    lengths: Tensor  # [B] tokens of each sequence
    wanted: Tensor  # [B, T] bool: the log-prob of this token is asked for
    plan: FoldPlan
    """The plan of every sequence, its positions counted in columns."""

    @classmethod
    def align(
        cls,
        sequences: Sequence[Sequence[int]],
        plans: Sequence[FoldPlan],
        wanted: Sequence[Sequence[bool]] | None = None,
    ) -> AlignedBatch:
        """Put sequences side by side.

        Args:
            sequences: token ids of question and thoughts.
            plans: one plan for each sequence; they may differ in `pin_tokens` only. Later questions
                must lie equally far from the blocks that are pinned at the start.
            wanted: which tokens' log-probs are asked for; None: all but the first.

        Raises:
            ValueError: if a sequence is empty, or the plans do not go together.
        """
        if not sequences or len(plans) != len(sequences):
            raise ValueError(f"{len(sequences)} sequences and {len(plans)} plans")
        if any(not tokens for tokens in sequences):
            raise ValueError("a sequence is empty")
        first = plans[0]
        pinned_blocks = max(p.pinned_blocks for p in plans)
        if first.bounded:
            left = [(pinned_blocks - p.pinned_blocks) * first.block_size for p in plans]
        else:
            left = [0] * len(plans)
        # What is drawn is counted from the end of the pinned blocks, so it is the same columns.
        pinned = pinned_blocks * first.block_size
        in_columns = {
            replace(p, pin_tokens=pinned, pin_spans=_moved(p.pin_spans, shift, pinned))
            for p, shift in zip(plans, left, strict=True)
        }
        if len(in_columns) > 1:
            raise ValueError(
                "plans of one batch must share window, evict ratio, block size, evict, its seed, "
                "what is kept, and where later questions lie after the pinned blocks"
            )
        (plan,) = in_columns
        lengths = [len(tokens) for tokens in sequences]
        columns = max(shift + length for shift, length in zip(left, lengths, strict=True))
        ids = torch.zeros(len(sequences), columns, dtype=torch.int64)
        marks = torch.zeros(len(sequences), columns, dtype=torch.bool)
        for b, (shift, tokens) in enumerate(zip(left, sequences, strict=True)):
            own = slice(shift, shift + len(tokens))
            ids[b, own] = torch.tensor(list(tokens))
            if wanted is not None and len(wanted[b]) != len(tokens):
                raise ValueError(f"sequence {b}: {len(tokens)} tokens, {len(wanted[b])} marks")
            marks[b, own] = True if wanted is None else torch.tensor(list(wanted[b]))
            marks[b, shift] = False  # nothing comes before it
        return cls(
            ids=ids,
            left=torch.tensor(left),
            lengths=torch.tensor(lengths),
            wanted=marks,
            plan=plan,
        )

    def to(self, device: torch.device) -> AlignedBatch:
        """Return the batch with its tensors on `device`."""
        return AlignedBatch(
            ids=self.ids.to(device),
            left=self.left.to(device),
            lengths=self.lengths.to(device),
            wanted=self.wanted.to(device),
            plan=self.plan,
        )

    def by_token(self, values: Tensor) -> Tensor:
        """Turn `values: [B, T]` by column into `[B, longest]` by token, 0 past a sequence's end."""
        token = torch.arange(int(self.lengths.max()), device=values.device)[None]
        column = (token + self.left[:, None]).clamp(max=values.shape[1] - 1)
        return torch.where(token < self.lengths[:, None], values.gather(1, column), 0)


def _moved(spans: Spans, shift: int, pinned: int) -> Spans:
    """Move spans right; what of them lies in the blocks that are pinned anyway is left out."""
    moved = ((max(first + shift, pinned), end + shift) for first, end in spans)
    return tuple((first, end) for first, end in moved if first < end)
