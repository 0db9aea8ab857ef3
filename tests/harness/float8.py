"""8-bit KV caches on a CPU: whether vLLM's kernels have them here, and what stands in if not.

vLLM's attention over such a cache needs AVX-512 or AMX. `install` puts torch in place of the two
operators that know of 8 bits: one stores, in the order of vLLM's ISA `vec`; the other turns the
cache into float32, for vLLM's own attention to read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn

DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def why_not() -> str | None:
    """Return vLLM's own reason why its kernels have no 8-bit caches here; None where they do."""
    try:
        cpu_attn._get_attn_isa(torch.float32, 32, 64, "fp8")
    except NotImplementedError as error:
        return str(error)
    return None


needs_kernels = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
"""For tests of vLLM's own kernels."""


def stored(numbers: Tensor, scale: float, dtype: torch.dtype, *, nearest: bool = False) -> Tensor:
    """Quantise: toward zero as vLLM's CPU kernels do, or to the nearest as its GPU kernels do."""
    most = torch.finfo(dtype).max
    wanted = (numbers.float() * (1.0 / scale)).clamp(-most, most)
    found = wanted.to(dtype)
    if nearest:
        return found
    larger = found.float().abs() > wanted.abs()
    return (found.view(torch.uint8) - larger.to(torch.uint8)).view(dtype)  # one step to zero


def restored(numbers: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return what is read of numbers once they were stored, in float32."""
    return stored(numbers, scale, dtype).float() * scale


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's CPU backend take 8-bit caches until `monkeypatch` ends; needs a model in fp32."""
    attention, store = ops.cpu_attention_with_kv_cache, ops.cpu_attn_reshape_and_cache
    schedule, choose = ops.cpu_attn_get_scheduler_metadata, cpu_attn._get_attn_isa

    def stand_in_store(
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        isa: str,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        if kv_cache_dtype == "auto":
            store(key, value, key_cache, value_cache, slots, isa, k_scale, v_scale)
            return
        dtype, size = DTYPES[kv_cache_dtype], key_cache.shape[2]
        live = slots >= 0
        block, place = slots[live] // size, slots[live] % size
        heads = torch.arange(key.shape[1])
        by_number = key_cache.view(*key_cache.shape[:2], key_cache.shape[3], size)  # [.., D, bs]
        keys, values = (
            stored(numbers[: len(live)][live], scale, dtype).view(torch.uint8)
            for numbers, scale in ((key, k_scale), (value, v_scale))
        )
        by_number[block[:, None], heads, :, place[:, None]] = keys
        value_cache[block[:, None], heads, place[:, None]] = values

    def stand_in_attention(**args: Any) -> None:
        dtype = DTYPES.get(args["kv_cache_dtype"])
        if dtype is not None:
            sides = []
            for name in ("key", "value"):
                numbers = args[f"{name}_cache"].view(dtype).float() * args[f"{name[0]}_scale"]
                sides.append(numbers)
            both = torch.cat(sides, 2)  # one allocation, as vLLM's kernel takes their strides alike
            args["key_cache"], args["value_cache"] = both.chunk(2, 2)
            args["kv_cache_dtype"] = "auto"
        attention(**args)

    def stand_in_schedule(**args: Any) -> Tensor:
        return schedule(**{**args, "kv_cache_dtype": "auto"})

    def stand_in_choose(dtype: torch.dtype, size: int, head: int, kv: str | None = None) -> str:
        return choose(dtype, size, head) if kv in (None, "auto") else "vec"

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", stand_in_store)
    monkeypatch.setattr(ops, "cpu_attention_with_kv_cache", stand_in_attention)
    monkeypatch.setattr(ops, "cpu_attn_get_scheduler_metadata", stand_in_schedule)
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", stand_in_choose)
