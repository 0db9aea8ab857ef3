"""How the sums of a sequence lie in memory between folds: no number twice, and none left out.

A server holds S apart from the sums, where every token reads it. What a rule has besides
(`method.reference.Sums`) is held so that together with that S it gives the same sums again:

    the sum that is S itself     not held; where S is read in bfloat16, the other half of its bits
    a symmetric matrix           the numbers on and above the diagonal, r (r + 1) / 2 of them
    sums that no fold changes    not held
    any other                    as it is, in float32

`method.weight` says what that takes in bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pte_vllm.method.reference import UPDATE_RULES, Sums

REST = "S rest"
"""The name of the bits of S that bfloat16 has no room for."""


def held_sums(rule: str, sums: Sums, dtype: torch.dtype) -> Sums:
    """Return what has to be held of `sums` beside the S that tokens read.

    Args:
        rule: The update rule that they are of.
        sums: The sums, whole: matrices `[*, r, r]` or `[*, G, r]` and counts `[*]`, float32.
        dtype: The type in which tokens read S: float32 or bfloat16.
    """
    about = UPDATE_RULES[rule]
    held: Sums = {}
    if not about.changes:
        return held
    for name, value in sums.items():
        if name in about.symmetric:
            held[name] = pack_symmetric(value)
        elif name != about.state_sum:
            held[name] = value
        elif dtype == torch.bfloat16:
            held[REST] = split(value)[1]
    return held


def whole_sums(rule: str, held: Sums, state: Tensor) -> Sums:
    """Return the sums from what `held_sums` left of them, and S as tokens read it, `[*, G, r]`."""
    about = UPDATE_RULES[rule]
    sums = {
        name: unpack_symmetric(value, state.shape[-1]) if name in about.symmetric else value
        for name, value in held.items()
        if name != REST
    }
    if about.state_sum is not None:
        sums[about.state_sum] = join(state, held[REST]) if REST in held else state.float()
    return sums


def as_read(state: Tensor, dtype: torch.dtype) -> Tensor:
    """Return S in the type in which tokens read it, float32 or bfloat16."""
    return split(state)[0] if dtype == torch.bfloat16 else state


def rounded(state: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of `as_read` in float32; gradients pass as if nothing was rounded."""
    if dtype != torch.bfloat16:
        return state
    exact = state.detach()
    result: Tensor = state + (as_read(exact, dtype).float() - exact)  # both steps are exact
    return result


def split(state: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into the nearest bfloat16 and the bits that this leaves out, int16.

    A bfloat16 is the upper half of a float32. The lower half counts from there, up or down.
    """
    bits = state.contiguous().view(torch.int32)
    upper = ((bits + 0x8000) >> 16).to(torch.int16)
    rest = (bits & 0xFFFF).to(torch.int16)  # the same number modulo 2^16
    high = upper.view(torch.bfloat16)
    return torch.where(state.isnan(), state.to(torch.bfloat16), high), rest


def join(high: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 numbers that `split` was given."""
    upper = high.contiguous().view(torch.int16).to(torch.int32) << 16
    return (upper + rest.to(torch.int32)).view(torch.float32)


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return the numbers on and above the diagonal: `[*, r, r]` to `[*, r (r + 1) / 2]`."""
    first, _ = _places(matrix.shape[-1], matrix.device)
    return matrix.flatten(-2).index_select(-1, first)


def unpack_symmetric(packed: Tensor, rank: int) -> Tensor:
    """Return the matrix that `pack_symmetric` packed, `[*, r, r]`, symmetric to the last bit."""
    _, back = _places(rank, packed.device)
    matrix: Tensor = packed.index_select(-1, back).unflatten(-1, (rank, rank))
    return matrix


@lru_cache(maxsize=64)
def _places(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each packed number is in the flat matrix, and where to find each of those."""
    rows, columns = torch.triu_indices(rank, rank)
    back = torch.empty(rank, rank, dtype=torch.int64)
    back[rows, columns] = back[columns, rows] = torch.arange(len(rows))
    return (rows * rank + columns).to(device), back.flatten().to(device)
