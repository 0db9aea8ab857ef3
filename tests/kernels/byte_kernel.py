"""A kernel that only converts what a cache holds; imported once Triton's interpreter is chosen."""

from __future__ import annotations

import triton
import triton.language as tl

from pte_vllm.kernels.cache_triton import to_float


@triton.jit
def convert(stored_ptr, found_ptr, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert all 256 bytes, `stored_ptr: [256]` uint8, into `found_ptr: [256]` fp32."""
    i = tl.arange(0, 256)
    tl.store(found_ptr + i, to_float(tl.load(stored_ptr + i), FORMAT))
