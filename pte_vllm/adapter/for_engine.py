"""An adapter as an engine takes it: one that fits, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import torch

from pte_vllm.adapter.files import AdapterError, is_pte_adapter
from pte_vllm.adapter.format import Adapter, ModelShape, own_probes


def load_for_engine(
    path: str | Path,
    *,
    model: ModelShape,
    max_lora_rank: int,
    dtype: torch.dtype,
    load_inplace: bool,
) -> Adapter | None:
    """Load the adapter as an engine would; None for a plain LoRA, which is vLLM's to check.

    Of a plain LoRA, probes are checked here; `own_probes` reads them.

    Args:
        path: The adapter's directory.
        model: The sizes of the base model.
        max_lora_rank: The largest rank that the engine has room for.
        dtype: The engine's precision of LoRAs.
        load_inplace: Whether it is to take the place of another under the same name.

    Raises:
        AdapterError: if the adapter is broken, does not fit the model or the engine, or would
            replace another version under the same name.
    """
    if not is_pte_adapter(path):
        own_probes(path, model)
        return None
    if load_inplace:
        raise AdapterError(
            f"{path}: load_inplace is not supported for PTE adapters; load the new version under "
            "a new name, so that no sequence mixes two versions"
        )
    adapter = Adapter.load(path, model)
    assert adapter.pte is not None
    rank = max(adapter.pte.rank, adapter.pte.global_tokens)
    if rank > max_lora_rank:
        raise AdapterError(
            f"{path}: rank {rank} exceeds this server's --max-lora-rank {max_lora_rank}"
        )
    adapter.check_numbers(path, dtype)
    return adapter
