"""Checks which models a replay computes exactly."""

from __future__ import annotations

from typing import Any


def check_model(model: Any) -> None:
    """Refuse a model whose log-probs a replay would get wrong.

    Args:
        model: a transformers causal LM.

    Raises:
        ValueError: naming what the replay does not support.
    """
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is None:
        raise ValueError(
            f"{type(model).__name__} has no model.rotary_emb; replay supports models built like "
            "Llama and Qwen"
        )
    rope_type = rotary.rope_type
    if not isinstance(rope_type, str) or "dynamic" in rope_type or rope_type == "longrope":
        raise ValueError(f"rope type {rope_type!r}: frequencies that vary cannot be undone")
    layer_types = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    if set(layer_types) != {"full_attention"} if layer_types else window is not None:
        raise ValueError("replay supports models with plain full attention only")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{name}: replay supports models whose logits are lm_head's output")
