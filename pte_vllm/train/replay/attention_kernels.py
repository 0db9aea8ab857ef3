"""Attention implementations of a replay, by the names that `--model.attention` takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ATTENTIONS = ("sdpa", "eager", "xformers")
_XFORMERS = "pte_xformers"


def resolve_attention(name: str, device: torch.device) -> str:
    """Return the name by which transformers knows an implementation; registers xformers' if named.

    Raises:
        ValueError: on an unknown name, or where xformers cannot run.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    if name != "xformers":
        return name
    if device.type != "cuda":
        raise ValueError(
            f"attention xformers runs on CUDA only, and the device is {device.type}; use sdpa"
        )
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "attention xformers needs the package xformers: pip install 'pte-vllm[xformers]'"
        ) from error
    from transformers import AttentionInterface

    AttentionInterface.register(_XFORMERS, _xformers_attention)
    return _XFORMERS


def _xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it: the result is `[B, n, heads, D]`, no weights.

    Args:
        query: `[B, heads, n, D]`.
        key: `[B, KV heads, t, D]`, and `value` likewise.
        attention_mask: `[B, 1, n, t]`, added to the scores; without it every query sees every key.
    """
    from xformers.ops import memory_efficient_attention

    group = query.shape[1] // key.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if group > 1:
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    if attention_mask is None:
        return memory_efficient_attention(q, k, v, scale=scaling), None
    num_keys = k.shape[1]
    # xformers wants a bias whose rows start at multiples of 8 elements.
    room = -(-num_keys // 8) * 8
    bias = attention_mask.new_zeros(*attention_mask.shape[:-1], room)
    bias[..., :num_keys] = attention_mask
    bias = bias.expand(-1, query.shape[1], -1, -1)[..., :num_keys].to(q.dtype)
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scaling), None


def attention_mask(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Turn `visible: [B, n, t]`, bool, into an implementation's own mask, `[B, 1, n, t]`."""
    if implementation == "sdpa":
        return visible[:, None]
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)[:, None]
