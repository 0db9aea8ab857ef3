"""The kernels of kept tokens against the definition, on caches as vLLM's GPU backends lay them out.

`python -m tests.kernels.keep_cases` runs the small cases on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from pte_vllm.kernels import keep_torch
from pte_vllm.kernels.cache_numbers import raw
from pte_vllm.kernels.keep_torch import ProbedCache
from pte_vllm.method import keep
from tests.kernels.fold_cases import (
    NAN,
    Case,
    make_caches,
    make_scales,
    plain_layout,
    rope_table,
)

PROBES = 35

_PLAIN = (
    Case(rank=8, dim=64, heads=2, blocks=2, block_size=16, seqs=2, layers=1),
    Case(rank=8, dim=80, heads=1, blocks=3, block_size=16, seqs=1, layers=2, layout="HND"),
    Case(
        rank=8,
        dim=128,
        heads=2,
        blocks=2,
        block_size=32,
        seqs=1,
        layers=1,
        layout="BLHNC",
        dtype=torch.bfloat16,
    ),
    Case(rank=8, dim=64, heads=1, blocks=3, block_size=16, seqs=2, layers=1, rotary=0),
    Case(rank=8, dim=80, heads=2, blocks=2, block_size=16, seqs=1, layers=1, rotary=32),
)
SMALL = (
    *_PLAIN,
    *(
        replace(_PLAIN[-1], dim=dim, dtype=dtype, layers=2, layout="HND", scales=True)
        for dim, dtype in ((80, torch.float8_e4m3fn), (64, torch.float8_e5m2))
    ),
)
LARGE = tuple(
    replace(case, heads=4, blocks=17, seqs=9, layers=5, dtype=dtype)
    for case in SMALL
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
)


def check(case: Case, device: str) -> float:
    """Largest relative error of a score; asserts that it is small, and that copies are exact.

    A sequence has `case.blocks` blocks of candidates, and one block less of newest tokens.
    """
    from pte_vllm.kernels.cache_triton import CacheTable
    from pte_vllm.kernels.keep_triton import expected_scores_triton, put_triton, take_triton

    torch.manual_seed(0)
    num_newest = case.blocks - 1
    used = case.seqs * (case.blocks + num_newest)
    caches = make_caches(case, used + case.seqs + 4, device)
    order = torch.randperm(used + case.seqs) + 2
    ids = order[:used].view(case.seqs, -1).to(device)
    candidates, newest = ids[:, : case.blocks], ids[:, case.blocks :]
    own = order[used:, None].to(device)
    for cache in map(raw, caches):  # what belongs to others, or to nobody
        nan = NAN[cache.dtype]
        cache[:2], cache[-2:], cache[own[:, 0]] = nan, nan, nan
    layout = plain_layout(case.block_size, case.dim, device)
    rope = rope_table(case.dim if case.rotary is None else case.rotary, 1000, device)
    queries = torch.randn(case.layers, case.heads, PROBES, case.dim, device=device)
    scales = make_scales(case, device)
    probed = ProbedCache(queries=queries, rope=rope, scale=case.dim**-0.5, scales=scales)
    fold_at = torch.randint(0, 1000, (case.seqs,)).to(device)
    table = CacheTable.of(caches, scales)

    wanted = keep_torch.expected_scores(caches, layout, probed, candidates, newest, fold_at)
    found = expected_scores_triton(table, probed, candidates, newest, fold_at)
    assert found.shape == wanted.shape
    worst = float(((found - wanted).abs() / (wanted + 1e-6)).max())
    assert worst < 1e-4, f"{case}: relative error {worst:.1e}"

    kept = keep.best(found, case.block_size)
    taken = take_triton(table, candidates, kept)
    wanted = keep_torch.take(caches, layout, candidates, kept)
    assert taken.dtype == wanted.dtype and torch.equal(raw(taken), raw(wanted))
    before = [torch.empty_like(cache).copy_(cache) for cache in caches]
    put_triton(table, own, taken)
    keep_torch.put(before, layout, own, taken)
    for cache, other in zip(caches, before, strict=True):
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.dtype.itemsize]
        assert torch.equal(cache.view(bits), other.view(bits)), f"{case}: a copy differs"
    return worst


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    for small in SMALL:
        check(small, "cpu")
    print("ok")
