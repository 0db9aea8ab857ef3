"""Shows what each layer's attention is given while a transformers model reads a sequence.

`probe_sampling` takes queries from it, `future_attention` what later tokens attend to.

Letters in shapes: N tokens, H KV heads, G query heads of a KV head, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_SHOWN_SDPA = "pte_shown_sdpa"
"""Under this name transformers finds attention that shows its inputs first."""

Visit = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""Takes a layer's index, queries `[1, H·G, N, D]`, keys and values `[1, H, N, D]`, all after RoPE
and in the model's dtype, and the scale of their products."""


def visit_attention(model: Any, token_ids: Tensor, visit: Visit) -> None:
    """Run a causal LM on `token_ids: [N]`, on any device; shows `visit` each layer's attention."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        visit(module.layer_idx, query, key, value, scale)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(_SHOWN_SDPA, attention)
    AttentionMaskInterface.register(_SHOWN_SDPA, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_SHOWN_SDPA)
    try:
        model.model(input_ids=token_ids[None].to(model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(_SHOWN_SDPA, sdpa_attention_forward)  # holds nothing of ours
