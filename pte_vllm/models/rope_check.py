"""Checks whether RoPE of a transformers model can be undone the way keys are encoded.

Copies of one token, each alone at a position of its own, attend to themselves only: whatever the
weights, their hidden states are equal in every layer, and so must be their keys with RoPE undone.

Shapes: P positions, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pte_vllm.method import rope

_POSITIONS = (0, 1, 2, 5, 20, 100, 500, 2000)
"""Positions that together turn fast and slow pairs of dimensions alike."""
_TOLERANCE = 0.03
"""Largest difference of keys that is allowed, relative to their norm. Rounding moves them by up to
5e-3 in bfloat16, on random models and SmolLM2-135M alike; keys of another layout, or not turned at
all, differ by 0.17 to 1.7."""

_ADVICE = "leave it out of the adapter's layers, or encode keys as cached (keys = rotated)"


@torch.no_grad()
def check_unrotation(model: Any, layers: Collection[int], *, advice: str = _ADVICE) -> None:
    """Refuse a model of which some layer's keys would be encoded wrongly.

    One forward of a few tokens.

    Args:
        model: a transformers causal LM in any dtype, on any device, without an adapter.
        layers: those that get a state, and so need their keys without RoPE.
        advice: what to do about a layer without RoPE.

    Raises:
        ValueError: naming the kind of model, the layer, and what is the matter.
    """
    cache = DynamicCache()
    token = _telling_token(model)
    positions = torch.tensor(_POSITIONS, device=token.device)[:, None]
    model.model(
        input_ids=token.expand_as(positions),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    for layer in sorted(layers):
        held: Any = cache.layers[layer]
        cached = held.keys.transpose(1, 2)  # [P, 1, H, D]
        if not _spread(undo_rope(model, cached, positions)) <= _TOLERANCE:  # NaN is refused too
            if _spread(cached.float()) <= _TOLERANCE:
                matter = f"has no RoPE that could be undone; {advice}"
            else:
                matter = (
                    "has an unsupported RoPE layout: undone as in Llama (half layout, nothing "
                    "after it), keys of one token still differ from position to position"
                )
            raise ValueError(f"{model.config.model_type}: layer {layer} {matter}")


def undo_rope(model: Any, k: Tensor, positions: Tensor) -> Tensor:
    """Turn keys `[*, n, H, D]`, cached at `positions: [B, n]`, back to before RoPE, in fp32."""
    cos, sin = model.model.rotary_emb(k, positions)  # rounded to k's dtype, as applied
    half = cos.shape[-1] // 2  # transformers repeats the frequencies
    return rope.unrotate(k.float(), cos[..., :half].float(), sin[..., :half].float())


def _telling_token(model: Any) -> Tensor:
    """Choose a token whose embedding is not zero, as that of padding may be.

    The keys of such a token would all be equal.
    """
    norms = model.get_input_embeddings().weight[:1024].float().norm(dim=-1)
    token: Tensor = norms.argmax()
    return token


def _spread(keys: Tensor) -> float:
    """Compute the largest relative difference from the first of `keys: [P, 1, H, D]`."""
    off = (keys - keys[:1]).norm(dim=-1) / keys[:1].norm(dim=-1).clamp(min=1e-12)
    return float(off.max())
