"""How a transformers model scores tokens by probes: where probes stand, and by how much they count.

Shapes: B sequences, H KV heads, D head size, n probes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pte_vllm.adapter.format import ModelShape
from pte_vllm.method import rope


def rotated(base: Any, queries: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """Turn one layer's probes `[H, n, D]` to `positions: [B, n]`, as `[B, H, n, D]` fp32.

    The angles are rounded to the dtype of the cached keys `like`, as the model's own are.
    """
    cos, sin = base.model.rotary_emb(like, positions)
    half = cos.shape[-1] // 2  # transformers repeats the frequencies
    cos, sin = (t[:, None, :, :half].float() for t in (cos, sin))  # [B, 1, n, D / 2]
    return rope.rotate(queries, cos, sin)


def scale_of(base: Any, layer: int, shape: ModelShape) -> float:
    """Return what a layer multiplies products of queries and keys with."""
    scale: float = getattr(base.model.layers[layer].self_attn, "scaling", shape.head_dim**-0.5)
    return scale
