"""A head that drafts keeps, in its own layer, what the model's last layer keeps."""

from __future__ import annotations

import torch

from pte_vllm.engine.keeping import KeptTokens, Selection
from pte_vllm.engine.ranks import Ranks
from pte_vllm.engine.sequences import FoldingSequence
from pte_vllm.kernels.keep_torch import ProbedCache
from pte_vllm.method.plan import FoldPlan
from tests.kernels.fold_cases import Case, make_caches, plain_layout, rope_table

LAYERS, SEQS = 3, 2


def test_cells_move_along() -> None:
    case = Case(rank=8, dim=64, heads=2, blocks=4, block_size=16, seqs=SEQS, layers=LAYERS)
    plan = FoldPlan(pin_tokens=16, window_tokens=32, evict_ratio=0.5, block_size=16, keep_tokens=16)
    caches = make_caches(case, 16 * SEQS, "cpu")
    before, drafting = [cache.clone() for cache in caches], caches[-1].clone()
    kept = KeptTokens(
        caches=caches,
        layout=plain_layout(16, 64, "cpu"),
        ranks=Ranks(num_heads=2, head_dim=64),
        probed=ProbedCache(
            queries=torch.randn(LAYERS, 2, 32, 64), rope=rope_table(64, 1000, "cpu"), scale=0.125
        ),
        drafting=[drafting],
    )

    def block_ids(names: list[str], blocks: list[list[int]]) -> torch.Tensor:
        rows = zip(names, blocks, strict=True)
        return torch.tensor([[16 * int(name) + block for block in row] for name, row in rows])

    selections = [
        Selection(request_id=str(i), sequence=FoldingSequence(plan=plan), fold=1)
        for i in range(SEQS)
    ]
    kept.keep(selections, block_ids, {})
    assert all(not torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
    assert torch.equal(drafting, caches[-1])
