"""Counts what a GPU is asked to launch when sequences choose what they keep, without a GPU.

`python -m tests.kernels.keep_launches LAYERS SEQUENCES` runs `KeptTokens.keep` on the CPU in
Triton's interpreter, and prints how often kernels of ours run and how many operations of torch
compute something. Views cost nothing, and copies of records to the host are left out. An operation
of torch may take more than one launch, such as a sort.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.fold_cases import Case, make_caches, plain_layout, rope_table


class Operations(TorchDispatchMode):
    """Counts operations that write memory; those inside the interpreter are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.in_kernel = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        computes = not func.is_view and func.overloadpacket not in (
            torch.ops.aten.empty,
            torch.ops.aten.new_empty,
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.lift_fresh,
            torch.ops.aten.detach,
            torch.ops.aten.detach_,
            torch.ops.aten.clone,  # a record's copy to the host
        )
        if computes and not self.in_kernel:
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(layers: int, seqs: int) -> dict[str, int]:
    """Let `seqs` sequences choose at once, and count."""
    import triton

    from pte_vllm.engine.keeping import KeptTokens, Selection
    from pte_vllm.engine.ranks import Ranks
    from pte_vllm.engine.sequences import FoldingSequence
    from pte_vllm.kernels.cache_triton import CacheTable
    from pte_vllm.kernels.keep_torch import ProbedCache
    from pte_vllm.method.plan import FoldPlan

    case = Case(rank=8, dim=64, heads=2, blocks=4, block_size=16, seqs=seqs, layers=layers)
    plan = FoldPlan(pin_tokens=16, window_tokens=32, evict_ratio=0.5, block_size=16, keep_tokens=16)
    caches = make_caches(case, 16 * seqs, "cpu")
    probed = ProbedCache(
        queries=torch.randn(layers, 2, 32, 64), rope=rope_table(64, 1000, "cpu"), scale=0.125
    )
    kept = KeptTokens(
        caches=caches,
        layout=plain_layout(16, 64, "cpu"),
        ranks=Ranks(num_heads=2, head_dim=64),
        probed=probed,
        table=CacheTable.of(caches),
    )
    selections = [
        Selection(request_id=str(i), sequence=FoldingSequence(plan=plan), fold=1)
        for i in range(seqs)
    ]

    def block_ids(names: list[str], blocks: list[list[int]]) -> torch.Tensor:
        rows = zip(names, blocks, strict=True)
        return torch.tensor([[16 * int(name) + block for block in row] for name, row in rows])

    operations, kernels = Operations(), Counter[str]()
    with _counted(triton.runtime.interpreter.InterpretedFunction, operations, kernels), operations:
        kept.keep(selections, block_ids, {})
    assert all(len(s.sequence.survivals) == 1 for s in selections)
    print(operations.names, file=sys.stderr)
    return {"kernels": kernels.total(), "small": operations.names.total()}


@contextmanager
def _counted(kind: Any, operations: Operations, kernels: Counter[str]) -> Iterator[None]:
    """Note runs of Triton's kernels, and what torch does inside them as no launch of its own."""
    run: Callable[..., Any] = kind.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels[self.fn.__name__] += 1
        operations.in_kernel = True
        try:
            return run(self, *args, **kwargs)
        finally:
            operations.in_kernel = False

    kind.run = counting
    try:
        yield
    finally:
        kind.run = run


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    print(json.dumps(count(int(sys.argv[1]), int(sys.argv[2]))))
