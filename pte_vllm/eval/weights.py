"""What a thought state weighs, beside the KV cache that it stands for."""

from __future__ import annotations

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.weight import weigh_state


def state_bytes(adapter: Adapter, dtype: str) -> int:
    """Return what the thought state of one sequence holds between folds.

    Args:
        adapter: whose state it is; a plain LoRA has none.
        dtype: of the model, or of its KV cache: fp8 goes with a model in bfloat16.
    """
    if adapter.pte is None:
        return 0
    model = "bfloat16" if dtype == "fp8" else dtype
    return weigh_state(adapter.pte, len(adapter.layers), model).total


def in_kv_tokens(num_bytes: int, token_bytes: int) -> int:
    """Return how many tokens of a KV cache hold as many bytes, rounded up."""
    return -(-num_bytes // token_bytes)
