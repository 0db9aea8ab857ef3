"""Marks of kept tokens as bytes, which is how records carry them.

A mark says of one candidate whether it was kept (`method.keep.survival`). Marks are packed one bit
each: layer after layer, in it KV head after KV head, in that the candidates in the order of their
positions; the first one is the highest bit of the first byte. The last byte is filled with zeros.

Letters in shapes: L layers, H KV heads, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan


def packed(marks: Tensor) -> Tensor:
    """Pack marks `[*, L, H, C]`, bool, into `[*, ceil(L·H·C / 8)]` uint8 on the same device."""
    bits = marks.flatten(-3).byte()
    padded = functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    data: Tensor = (padded << _shifts(marks.device)).sum(-1).byte()
    return data


def packed_bytes(marks: Tensor) -> bytes:
    """Do the same as bytes, which waits for the device."""
    found: bytes = packed(marks).cpu().numpy().tobytes()
    return found


def unpacked(data: bytes, num_layers: int, num_heads: int, num_candidates: int) -> Tensor:
    """Unpack marks `[L, H, C]`, bool on the host.

    Raises:
        ValueError: If these are not the bytes of so many marks.
    """
    count = num_layers * num_heads * num_candidates
    size = -(-count // 8)
    if len(data) != size:
        raise ValueError(
            f"{num_layers} layers, {num_heads} KV heads and {num_candidates} candidates have marks "
            f"of {size} bytes, got {len(data)}"
        )
    bits = _bits(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if bool(bits[count:].any()):
        raise ValueError(f"{count} marks are followed by bits that are not zero")
    return bits[:count].view(num_layers, num_heads, num_candidates)


def unpacked_on(data: Tensor, num_layers: int, num_heads: int, num_candidates: int) -> Tensor:
    """Unpack what `packed` made, unchecked and on its device, which nobody waits for."""
    count = num_layers * num_heads * num_candidates
    return _bits(data)[:count].view(num_layers, num_heads, num_candidates)


def select_heads(data: bytes, num_layers: int, num_heads: int, heads: slice) -> bytes:
    """Return the marks of some of the KV heads; C must be a multiple of 8, as that of blocks is."""
    return _by_head(data, num_layers, num_heads)[:, heads].numpy().tobytes()


def join_heads(parts: Sequence[bytes], num_layers: int, num_heads: int) -> bytes:
    """Put marks together, of which each part has `num_heads` KV heads, to those of all heads."""
    return torch.cat([_by_head(part, num_layers, num_heads) for part in parts], 1).numpy().tobytes()


def _by_head(data: bytes, num_layers: int, num_heads: int) -> Tensor:
    """View packed marks as `[L, H, C / 8]` uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(num_layers, num_heads, -1)


def _bits(data: Tensor) -> Tensor:
    """Return the bits of bytes `[n]` uint8, from the highest of each, `[8 n]` bool."""
    return ((data[:, None] >> _shifts(data.device)) & 1).bool().flatten()


@cache
def _shifts(device: torch.device) -> Tensor:
    """From the highest bit of a byte to the lowest."""
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def num_candidates(plan: FoldPlan, fold: int) -> int:
    """Return how many tokens a fold chooses from, C: those kept before it and those that leave."""
    return (plan.kept_blocks(fold) + plan.evict_blocks) * plan.block_size


def marks_of(
    record: KeptRecord, plan: FoldPlan, num_layers: int, num_heads: int
) -> list[Tensor | None]:
    """Unpack a record: `[L, H, C]` bool for each fold, None for one that keeps all.

    Raises:
        ValueError: If it does not fit the plan and the model; the message names the fold.
    """
    return [
        marks_of_fold(data, plan, fold, num_layers, num_heads) for fold, data in enumerate(record)
    ]


def marks_of_fold(
    data: bytes | None, plan: FoldPlan, fold: int, num_layers: int, num_heads: int
) -> Tensor | None:
    """Unpack what one fold of a record says, `[L, H, C]` bool; None for one that keeps all.

    Raises:
        ValueError: If it does not fit the plan and the model; the message names the fold.
    """
    if (data is not None) != plan.selects(fold):
        what = "chooses what it keeps" if plan.selects(fold) else "keeps all candidates"
        raise ValueError(f"fold {fold} {what}, and the record says otherwise")
    if data is None:
        return None
    try:
        marks = unpacked(data, num_layers, num_heads, num_candidates(plan, fold))
    except ValueError as error:
        raise ValueError(f"fold {fold}: {error}") from error
    if not bool((marks.sum(-1) == plan.keep_tokens).all()):
        raise ValueError(f"fold {fold}: every head of every layer keeps {plan.keep_tokens}")
    return marks
