"""`pte-vllm adapter cast`: an adapter in 16 bits, which is half as large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pte_vllm.adapter.files import AdapterError
from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.hashes import FILES
from pte_vllm.adapter.placing import check_free, made_aside, put_in_place
from pte_vllm.adapter.probes import Probes


def cast_adapter(path: str | Path, out: str | Path, dtype: str) -> None:
    """Write an adapter with its LoRA matrices and its probes rounded; the encoder stays fp32.

    A server rounds the matrices to the dtype of its model anyway. Probes are rounded to float16, in
    which they lose least, where that holds them.

    Args:
        path: the adapter's directory.
        out: the directory to write, which appears whole or not at all.
        dtype: of the matrices: `bfloat16` or `float16`.

    Raises:
        AdapterError: if the adapter is broken, or a number is too large for the dtype.
        ValueError: if `out` holds anything else than this.
    """
    out = Path(out)
    adapter = Adapter.load(path)
    check_free(out)
    chosen = getattr(torch, dtype)

    def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: tensor.to(chosen) for name, tensor in tensors.items()}
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise AdapterError(f"--dtype {dtype} cannot hold {name}; bfloat16 can")
        return found

    made = replace(
        adapter,
        lora_a=rounded(dict(adapter.lora_a)),
        lora_b=rounded(dict(adapter.lora_b)),
        probes=None if adapter.probes is None else _half(adapter.probes),
    )
    with made_aside(out) as scratch:
        made.save(scratch)
        put_in_place(scratch, out)
    before, after = (_weight(Path(where)) for where in (path, out))
    Console(stderr=True, highlight=False).print(
        f"wrote {out}: {after / 1e6:.1f} MB, before {before / 1e6:.1f} MB", soft_wrap=True
    )


def _half(probes: Probes) -> Probes:
    for dtype in (torch.float16, torch.bfloat16):
        queries = probes.queries.to(dtype)
        if bool(queries.isfinite().all()):
            return Probes.of(queries, probes.model_hash)
    return probes


def _weight(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in FILES if (directory / name).exists())
