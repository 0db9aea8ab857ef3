"""RoPE in the "half" layout of Llama and Qwen, and how it is undone on cached keys.

Shapes: m tokens, H KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """Turn `x: [*, D]` by a right angle in the "half" layout: (x1, x2) becomes (−x2, x1)."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def unrotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo RoPE ("half" layout, as Llama and Qwen) on cached keys.

    `k: [*, m, H, D]`; `cos, sin: [*, m, rotary_dim / 2]` as the model applied them, attention
    scaling included: dividing by cos² + sin² undoes a scaled rotation too. Dimensions past
    `rotary_dim` are untouched.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos2 = torch.cat((cos, cos), -1)[..., None, :]
    sin2 = torch.cat((sin, sin), -1)[..., None, :]
    turned, rest = k[..., :rotary_dim], k[..., rotary_dim:]
    plain = (turned * cos2 - rotate_half(turned) * sin2) / (cos2 * cos2 + sin2 * sin2)
    return torch.cat((plain, rest), -1) if rest.shape[-1] else plain


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE ("half" layout) to `q: [*, D]`, with `cos, sin: [*, rotary_dim / 2]`.

    It is what `unrotate` undoes, up to the scaling that some models' tables have.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos2, sin2 = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    turned, rest = q[..., :rotary_dim], q[..., rotary_dim:]
    turned = turned * cos2 + rotate_half(turned) * sin2
    rest = rest.expand(*turned.shape[:-1], -1)  # there may be more angles than queries
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
