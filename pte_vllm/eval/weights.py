"""What a thought state weighs, beside the KV cache that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pte_vllm.adapter.hashes import ENCODER_FILE
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.weight import NO_STATE, weigh_state


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight of one sequence's thought state."""

    state_bytes: int
    kv_tokens: int | None
    """Tokens of KV cache that weigh as much, rounded up; None where a token's weight is unknown."""


def state_weight(adapter: str, *, dtype: str, kv_bytes_per_token: int | None) -> Weights:
    """Weigh the thought state that an adapter keeps for a sequence; a plain LoRA keeps none.

    Args:
        adapter: its directory.
        dtype: of the model that is served.
        kv_bytes_per_token: what the keys and values of a token weigh there.

    Raises:
        ValueError: if the adapter's options are broken.
        OSError: if its files cannot be read.
    """
    import json

    from safetensors import safe_open

    found = NO_STATE
    options = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("pte")
    if options is not None:
        with safe_open(Path(adapter) / ENCODER_FILE, framework="numpy") as file:
            layers = {name.split(".")[1] for name in file.keys()}  # noqa: SIM118  # no iterator
        found = weigh_state(PTEConfig.from_dict(options), len(layers), dtype)
    tokens = None
    if kv_bytes_per_token:
        tokens = math.ceil(found.kv_tokens(kv_bytes_per_token))
    return Weights(state_bytes=found.total, kv_tokens=tokens)
