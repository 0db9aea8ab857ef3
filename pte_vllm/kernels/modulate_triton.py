"""Modulation on a GPU: one launch for all slices of a linear, no copy of the states.

Definition: `method.reference.modulate`. A program per token reads its state once and multiplies
every slice by it, in place, squared before where the slot's adapter has squared features; tokens of
slot 0, the identity, are left as they are. Nothing depends on the host, so the launch can be
captured into a CUDA graph.

Letters in shapes: n slices of a merged linear, T tokens, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _modulate_kernel(  # type: ignore[no-untyped-def]
    a_ptr,  # [n, T, R] fp32
    states_ptr,  # [slots, R, R] fp32 or bf16
    squared_ptr,  # [slots] bool
    slots_ptr,  # [T] int64
    num_slices,
    slice_stride,
    rank,
    BLOCK: tl.constexpr,  # the power of two from R on
):
    token = tl.program_id(0)
    slot = tl.load(slots_ptr + token)
    if slot != 0:
        index = tl.arange(0, BLOCK)
        inside = index < rank
        state = tl.load(
            states_ptr + slot * rank * rank + index[:, None] * rank + index[None, :],
            mask=inside[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        squared = tl.load(squared_ptr + slot)
        for i in range(num_slices):
            row = a_ptr + i * slice_stride + token * rank + index
            a = tl.load(row, mask=inside, other=0.0)
            a = tl.where(squared, a * a, a)
            tl.debug_barrier()  # the store must not overtake other warps' loads of the same row
            tl.store(row, tl.sum(a[:, None] * state, axis=0), mask=inside)


def modulate_slices_(a: Tensor, states: Tensor, squared: Tensor, token_slots: Tensor) -> None:
    """Set `a[i, t] ← φ(a[i, t]) · states[token_slots[t]]`, in place.

    `a: [n, T, R]` fp32 contiguous, `states: [slots, R, R]` contiguous, fp32 or bf16, ready to be
    multiplied from the right, `squared: [slots]` bool, whether φ squares, `token_slots` int64, of
    which the first T count.
    """
    num_slices, num_tokens, rank = a.shape
    if num_tokens:
        _modulate_kernel[(num_tokens,)](
            a,
            states,
            squared,
            token_slots,
            num_slices,
            a.stride(0),
            rank,
            BLOCK=triton.next_power_of_2(rank),
            num_warps=4 if rank <= 64 else 8,
        )
