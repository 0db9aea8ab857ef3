"""What stands in the cells of a KV cache: numbers of 32 or 16 bits, or of 8 bits with scales.

vLLM hands out a cache of 8 bits as `uint8`, and its option's name does not tell the format: on a
GPU, `fp8_e5m2` is stored as e4m3 by the Triton backend. So the format is found as the order of a
block is, by writing. From there on the format is the tensor's dtype, one of `FLOAT8`.

A layer has one scale for keys and one for values: what was written is what is stored times that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""The formats of 8 bits."""
_SAMPLE = 1.3
"""Between two numbers of both formats, so that 1.25 is stored however a backend rounds."""


def raw(cache: Tensor) -> Tensor:
    """Return the same memory as bytes if its numbers have 8 bits; torch moves only bytes of them.

    Args:
        cache: Any tensor.
    """
    return cache.view(torch.uint8) if cache.dtype in FLOAT8 else cache


def layer_scales(layer: Any) -> tuple[float, float]:
    """Return what the stored keys and the stored values of a vLLM `Attention` layer are times.

    Raises:
        ValueError: If its heads have scales of their own.
    """
    if layer.kv_cache.dtype.itemsize > 1:  # vLLM's kernels leave scales out
        return 1.0, 1.0
    for scale in (layer._k_scale, layer._v_scale):
        if scale.numel() != 1:
            raise ValueError(
                f"this checkpoint has a scale of the KV cache for each of {scale.numel()} heads, "
                "and PTE supports one for a layer: serve it with the model's own type, such as "
                "--kv-cache-dtype bfloat16"
            )
    return layer._k_scale_float, layer._v_scale_float


def stored_dtype(layer: Any) -> torch.dtype:
    """Find what the numbers in the cache of a vLLM `Attention` layer are; the cache is allocated.

    Raises:
        RuntimeError: If they are neither of 16 or 32 bits nor of one of the formats of 8 bits.
        ValueError: As `layer_scales`.
    """
    cache = layer.kv_cache
    if cache.dtype.itemsize > 1:
        return cache.dtype  # type: ignore[no-any-return]
    _, _, block_size, width = cache.shape
    block = written(layer, cache.new_full((block_size * width,), _SAMPLE, dtype=torch.float32))
    for dtype in FLOAT8:
        if bool((block.view(dtype).float() == 1.25).all()):
            return dtype
    raise unreadable(layer)


def written(layer: Any, numbers: Tensor) -> Tensor:
    """Have a layer write numbers into a block of its own making, and return one head's cells.

    Args:
        layer: vLLM's `Attention`; its cache is `[blocks, H, bs, 2 D]`.
        numbers: What is stored in every head: all keys `[bs, D]`, then all values, `[2 * bs * D]`
            float32. They are written times the scales.

    Returns:
        The cells in the order of memory, `[2 * bs * D]` in the cache's dtype.

    Raises:
        ValueError: As `layer_scales`.
    """
    cache = layer.kv_cache
    _, heads, block_size, width = cache.shape
    scratch = torch.zeros_like(cache[:1], memory_format=torch.contiguous_format)
    per_token = numbers.view(2, block_size, 1, width // 2).expand(-1, -1, heads, -1)
    dtype = layer.dtype if cache.dtype.itemsize == 1 else cache.dtype
    key, value = (
        (stored * scale).to(dtype).contiguous()
        for stored, scale in zip(per_token, layer_scales(layer), strict=True)
    )
    slots = torch.arange(block_size, device=cache.device)
    layer.impl.do_kv_cache_update(layer, key, value, scratch, slots)
    return scratch[0, 0].flatten()


def unreadable(layer: Any) -> RuntimeError:
    """Return the error that says that what a layer writes cannot be found again."""
    return RuntimeError(
        f"{type(layer.impl).__name__} stores the KV cache in a form PTE cannot read back; "
        "use --kv-cache-dtype auto and another --attention-backend"
    )
