"""The two kernels against PyTorch and the definition: largest relative error, and time per call.

Letters in shapes: L layers, S sequences, T tokens, H KV heads, D head size, r rank.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable, read_evicted
from pte_vllm.kernels.cache_triton import CacheTable
from pte_vllm.kernels.fold_triton import evicted_moments
from pte_vllm.kernels.modulate import modulate_slices
from pte_vllm.kernels.modulate_triton import modulate_slices_
from pte_vllm.method import reference
from pte_vllm.method.reference import LayerEncoder

_RANK, _BLOCK = 32, 16
_BYTES_AT_MOST = 8 * 2**30
"""Of keys and values in fp32 that the PyTorch path may write out."""


def run(*, dry_run: bool) -> list[dict[str, Any]]:
    """One record for each kernel, size and type; `dry_run` takes tiny sizes on the CPU."""
    device = "cpu" if dry_run else "cuda"
    layers, heads, dim = (2, 2, 32) if dry_run else (28, 4, 128)
    folds = [(2, 2)] if dry_run else [(1, 32), (8, 32), (64, 32), (400, 32), (8, 16), (8, 64)]
    batches = [(2, 3)] if dry_run else [(64, 1), (512, 2), (512, 3), (1024, 3), (8192, 3)]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for num_seqs, blocks in folds:
            rows.append(_fold(device, dtype, layers, heads, dim, num_seqs, blocks))
    for tokens, slices in batches:
        rows.append(_modulate(device, tokens, slices))
    return rows


def _fold(
    device: str, dtype: torch.dtype, layers: int, heads: int, dim: int, num_seqs: int, blocks: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    pool = num_seqs * blocks
    shape = (pool, _BLOCK, heads, 2 * dim)  # in memory, as FlashAttention and Triton keep it
    caches = [
        torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(layers)
    ]  # [blocks, H, bs, 2 D]
    cells = torch.arange(_BLOCK * 2 * dim, device=device).view(_BLOCK, 2 * dim)
    layout = BlockLayout(key_index=cells[:, :dim], value_index=cells[:, dim:])
    encoder = _encoder(layers, heads * dim, device)
    block_ids = torch.randperm(pool, device=device).view(num_seqs, blocks)
    steps = torch.arange(blocks, device=device) * _BLOCK
    positions = torch.randint(0, 4096, (num_seqs, 1), device=device) + steps
    frequencies = 1e6 ** -(torch.arange(dim // 2, device=device) / (dim // 2))
    angles = torch.arange(8192, device=device)[:, None] * frequencies
    rope = RopeTable(cos=angles.cos(), sin=angles.sin())
    table, by_layer = CacheTable.of(caches), encoder.map(lambda t: t[:, None])

    def kernel() -> Tensor:
        return evicted_moments(table, encoder, block_ids, positions, rope, with_kk=True).kv

    def plain() -> Tensor:
        k_e, v_e = read_evicted(caches, layout, block_ids, positions, rope)
        return reference.moments(by_layer, k_e, v_e, with_kk=True).kv

    copied = 2 * 4 * layers * pool * _BLOCK * heads * dim
    fits = copied <= _BYTES_AT_MOST
    read = 2 * layers * pool * _BLOCK * heads * dim * caches[0].element_size()
    row: dict[str, Any] = {
        "kernel": "fold",
        "dtype": str(dtype).removeprefix("torch."),
        "size": f"{num_seqs} sequences x {blocks * _BLOCK} tokens x {layers} layers",
        "ms": _time(kernel, device),
        "torch_ms": _time(plain, device) if fits else None,
        "error": _error(kernel(), plain()) if fits else None,
    }
    row["gb_per_s"] = read / row["ms"] / 1e6
    return row


def _encoder(layers: int, d_kv: int, device: str) -> LayerEncoder:
    def noise(*shape: int) -> Tensor:
        return torch.randn(layers, *shape, device=device) / math.sqrt(d_kv)

    names = ("query", "global_", "w_q", "w_k", "w_v")
    matrices = {name: noise(_RANK, d_kv) for name in names}
    vectors = {name: noise(_RANK) for name in ("b_k", "b_v")}
    vectors |= {name: noise() for name in ("gain", "log_ridge")}
    tensors: dict[str, Any] = matrices | vectors
    return LayerEncoder(**tensors)


def _modulate(device: str, tokens: int, slices: int) -> dict[str, Any]:
    torch.manual_seed(0)
    slots = min(tokens, 1024)
    states = torch.randn(slots + 1, _RANK, _RANK, device=device) / math.sqrt(_RANK)  # keeps norms
    states[0] = torch.eye(_RANK, device=device)
    squared = torch.arange(slots + 1, device=device) % 2 == 1
    token_slots = torch.arange(tokens, device=device) * slots // tokens  # long chunks if many
    a = torch.randn(slices, tokens, _RANK, device=device)
    found, wanted = a.clone(), a.clone()
    modulate_slices_(found, states, squared, token_slots)
    for i in range(slices):
        a_i, of_tokens = a[i][:, None], states[token_slots]
        linear, squares = (
            reference.modulate(a_i, of_tokens, "key", features)[:, 0]
            for features in ("linear", "squared")
        )
        wanted[i] = torch.where(squared[token_slots][:, None], squares, linear)
    scratch, about = a.clone() * 1e-3, (states, squared, token_slots)
    return {
        "kernel": "modulate",
        "dtype": "float32",
        "size": f"{tokens} tokens x {slices} slices",
        "ms": _time(lambda: modulate_slices_(scratch, *about), device),
        "torch_ms": _time(lambda: modulate_slices(scratch, *about), device),
        "error": _error(found, wanted),
    }


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _time(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median milliseconds of a call after warming up; on a GPU by its own clock."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))
