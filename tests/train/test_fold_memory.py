"""What stays of each fold until the backward pass, in bytes of tensors that are alive."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay
from tests.harness.models import random_tokens

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK, EVICT_BLOCKS, WINDOW_BLOCKS = 16, 4, 8
SEQUENCES, FOLDS = 2, 8
LAYERS, D_KV = 3, 64  # of the tiny checkpoint


class LiveStorages(TorchDispatchMode):
    """All storages made inside the block that something still holds, the autograd graph included.

    Hooks on saved tensors would not do: what a checkpoint keeps is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages = WeakIdKeyDictionary(ref_type=ref)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._storages[leaf.untyped_storage()] = None
        return result

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)


def bytes_per_fold(model: PTEModel, rule: str, keep_tokens: int = 0) -> list[int]:
    """By how much each fold but the first raises what is alive at the end of a segment."""
    plan = FoldPlan(
        pin_tokens=BLOCK,
        window_tokens=WINDOW_BLOCKS * BLOCK,
        evict_ratio=EVICT_BLOCKS / WINDOW_BLOCKS,
        block_size=BLOCK,
        keep_tokens=keep_tokens,
        keep_score="random" if keep_tokens else "expected",
    )
    # One token more, so that the last segment is as long as the others.
    length = plan.first_fold + FOLDS * EVICT_BLOCKS * BLOCK + 1
    ids = [random_tokens(length, seed=seed) for seed in range(SEQUENCES)]
    batch = AlignedBatch.align(ids, [plan] * SEQUENCES)
    alive = []
    with LiveStorages() as live:

        def loss(scores: Scores) -> torch.Tensor:
            alive.append(live.num_bytes)
            return -scores.logprobs.sum()

        result = replay(model, batch, rule=rule, backward="segments", loss=loss)
    assert len(alive) == 1 + FOLDS and all(len(folds) == FOLDS + 1 for folds in result.folds)
    return [after - before for before, after in pairwise(alive[1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rule", "keep_tokens"),
    [
        *((rule, 0) for rule in ("paper", "ridge", "delta", "none")),
        # As much as one fold evicts: the first fold fills it, and later ones replace some of it.
        *((rule, EVICT_BLOCKS * BLOCK) for rule in ("ridge", "none")),
    ],
)
def test_a_fold_keeps_what_it_evicted_once_in_the_caches_dtype(
    rule: str, keep_tokens: int, dtype: torch.dtype, tiny: Tiny, adapters: Adapters
) -> None:
    path = tiny("llama")
    model = PTEModel.from_pretrained(path, adapters(path), dtype=dtype)
    found = bytes_per_fold(model, rule, keep_tokens)
    tokens = SEQUENCES * EVICT_BLOCKS * BLOCK
    evicted = 2 * tokens * D_KV * dtype.itemsize * LAYERS
    print(f"{rule}, {dtype}: {found} bytes a fold, {evicted} of evicted keys and values")
    if rule == "none":  # nothing is encoded, so nothing needs to stay
        assert max(found) < 0.05 * evicted
    else:  # states and their gradients, and sums: [r, r] each
        assert evicted <= min(found) and max(found) <= 1.1 * evicted
