"""What ranks that share out a model send each other, with PTE and without. Standard library only.

vLLM adds up the outputs of `o_proj` and `down_proj` of every layer in each step. PTE also adds up
A x of both where tokens have a thought state, in float32, and once for each fold what the ranks
have projected (`pte_vllm/engine/ranks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pte_vllm.bench.sizing.model import Model
from pte_vllm.method.plan import FoldPlan

_SHARED_LINEARS = 2
"""Of a layer, whose inputs are shared out: o_proj and down_proj."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Sums:
    """How often ranks add up, and how many bytes each puts in."""

    count: int
    num_bytes: float


def step_sums(model: Model, itemsize: float) -> Sums:
    """Return vLLM's own sums of a step, bytes by token of the step."""
    count = _SHARED_LINEARS * model.layers
    return Sums(count=count, num_bytes=count * model.hidden_size * itemsize)


def state_sums(model: Model, rank: int) -> Sums:
    """Return what thought states of a rank add to a step, bytes by token of the step."""
    count = _SHARED_LINEARS * model.layers
    return Sums(count=count, num_bytes=count * rank * _FP32)


def fold_sums(model: Model, plan: FoldPlan, rank: int) -> Sums:
    """Return the sums of one fold, bytes by sequence that folds; kept tokens need none."""
    evicted = plan.evict_blocks * plan.block_size
    return Sums(count=1, num_bytes=model.layers * evicted * 2 * rank * _FP32)


def kv_copies(model: Model, ranks: int) -> int:
    """Return how many ranks hold each KV head.

    Raises:
        ValueError: if vLLM cannot share the heads out among so many.
    """
    if model.heads % ranks or max(ranks, model.kv_heads) % min(ranks, model.kv_heads):
        raise ValueError(
            f"--tensor-parallel-size {ranks} does not fit {model.heads} heads and "
            f"{model.kv_heads} KV heads"
        )
    return max(1, ranks // model.kv_heads)
