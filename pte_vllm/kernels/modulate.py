"""Modulation between LoRA's shrink and expand: every token by the state of its sequence.

Definition: `method.reference.modulate`. States are stored ready to be multiplied from the right
(transposed for read `value`), so one product serves both. They are float32 or bfloat16; products
are in float32. `squared: [slots]` bool says whose A x is squared first
(`method.reference.feature_map`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Segment = tuple[int, int, int]
"""Tokens `[start, end)` of the step and the slot of their sequence."""


def map_features(a: Tensor, squared: Tensor, token_slots: Tensor) -> Tensor:
    """Apply `method.reference.feature_map` by token: `a: [.., T, R]`, `token_slots: [T]` int64."""
    return torch.where(squared.index_select(0, token_slots)[:, None], a.square(), a)


def modulate_tokens(a: Tensor, states: Tensor, squared: Tensor, token_slots: Tensor) -> Tensor:
    """Multiply every token by its own state, without waiting for the device.

    `a: [T, R]` fp32, `states: [slots, R, R]`, `token_slots: [T]` int64; returns `[T, R]`.
    """
    return _by_token(map_features(a, squared, token_slots), states, token_slots)


def modulate_slices(a: Tensor, states: Tensor, squared: Tensor, token_slots: Tensor) -> None:
    """Do as `modulate_tokens` for all slices of a merged linear, in place.

    `a: [n, T, R]` fp32; of `token_slots` the first T count.
    """
    token_slots = token_slots[: a.shape[1]]
    features = map_features(a, squared, token_slots)
    chosen = states.index_select(0, token_slots).float()
    a.copy_(torch.bmm(features.transpose(0, 1), chosen).transpose(0, 1))


def modulate_segments(
    a: Tensor,
    states: Tensor,
    squared: Tensor,
    token_slots: Tensor,
    segments: Sequence[Segment],
) -> Tensor:
    """Multiply tokens by their states with one product per longer chunk, and one for the rest.

    `segments` are the chunks of the step in order; the other arguments and the result are as in
    `modulate_tokens`.
    """
    a = map_features(a, squared, token_slots)
    out = torch.empty_like(a)
    single = []
    for start, end, slot in segments:
        if end - start == 1:
            single.append(start)
        else:
            torch.mm(a[start:end], states[slot].float(), out=out[start:end])
    if len(single) == len(a):
        return _by_token(a, states, token_slots)
    if single:
        rows = torch.tensor(single, device=a.device)
        out[rows] = _by_token(a[rows], states, token_slots[rows])
    return out


def _by_token(features: Tensor, states: Tensor, token_slots: Tensor) -> Tensor:
    return torch.bmm(features[:, None], states.index_select(0, token_slots).float())[:, 0]
