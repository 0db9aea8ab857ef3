"""The paged cache as Triton's kernels find it, and what they take its numbers for.

Numbers of 8 bits are read as bytes and told by their bits: not every GPU converts both formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pte_vllm.kernels.cache_numbers import raw

_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@dataclass(frozen=True)
class CacheTable:
    """The caches of the layers with a state, as the kernel finds them: addresses and strides.

    Holds the caches, so that the addresses stay good.
    """

    caches: Sequence[Tensor]  # L, each [blocks, H, bs, 2 D]; bytes where numbers have 8 bits
    addresses: Tensor  # [L] int64
    scales: Tensor  # [L, 2] float32, of stored keys and values
    dtype: torch.dtype  # of the caches

    @classmethod
    def of(cls, caches: Sequence[Tensor], scales: Tensor | None = None) -> CacheTable:
        """Copy the addresses to the device and wait for it; done once for an adapter's layers.

        Args:
            caches: The caches.
            scales: What stored keys and values are multiplied with, `[L, 2]` float32; None: 1.
        """
        device, addresses = caches[0].device, torch.tensor([cache.data_ptr() for cache in caches])
        if scales is None:
            scales = torch.ones(len(caches), 2, device=device)
        return cls(
            caches=tuple(raw(cache) for cache in caches),
            addresses=addresses.to(device),
            scales=scales.contiguous(),
            dtype=caches[0].dtype,
        )

    @property
    def format(self) -> str:
        """The form of the caches' numbers, in the words of `to_float`."""
        return _FORMATS.get(self.dtype, "plain")


@triton.jit  # type: ignore[untyped-decorator]
def to_float(stored, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What numbers loaded from a cache are, in fp32; exact, like `torch.Tensor.float`."""
    if FORMAT == "e5m2":  # a half without its last byte
        bits = stored.to(tl.uint16) << 8
        found = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "e4m3":  # a half's exponent counts from 8 less
        bits = stored.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        found = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        found = tl.where((bits & 0x7F) == 0x7F, float("nan"), found)
    else:
        found = stored.to(tl.float32)
    return found
