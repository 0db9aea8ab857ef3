"""What a fold that keeps tokens costs one sequence on a GPU, counted from the kernels.

The counts are those of `kernels.keep_triton` with the score `expected`. Letters: L layers, H KV
heads, D head size, n probes, K tokens that are kept, E tokens that leave, C = K + E candidates.

    read      probes; keys of C + E tokens for the sums, keys and values of C for the scores; K
              tokens to copy
    written   K tokens, which are staged once in between
    FLOPs     products of probes with C + E keys and again with C, 2 D each; norms of C values
"""

from __future__ import annotations

from dataclasses import dataclass

from pte_vllm.bench.sizing.hardware import Hardware
from pte_vllm.bench.sizing.model import Model
from pte_vllm.method.plan import FoldPlan

KERNEL_LAUNCHES = 4
"""Sums, scores, copies out of the cache and into it: for all layers and all sequences that fold in
the same step and hold as much."""
SMALL_LAUNCHES = 15
"""Operations of torch around them: positions, sorting, marks for the record. A test counts them.
Besides, the record of each sequence is copied to the host."""
PROBES = 512
"""For each KV head of each layer, as `adapter calibrate` draws them."""


@dataclass(frozen=True, kw_only=True)
class FoldCost:
    """The cost of one fold of one sequence that has its K tokens already."""

    window_tokens: int
    keep_tokens: int
    every_tokens: int
    """Tokens from one fold to the next, E."""
    read_bytes: float
    written_bytes: float
    operations: float
    """In float32."""
    kept_bytes: float
    """Of the kept tokens themselves: what the sequence holds because of them."""
    record_bytes: int
    """Of a rollout record, for each fold."""

    def seconds(self, hardware: Hardware) -> float:
        """Return how long it takes at least: the slower of traffic and arithmetic."""
        traffic = (self.read_bytes + self.written_bytes) / hardware.bandwidth
        return max(traffic, self.operations / hardware.fp32_peak)

    def share_of_step(
        self, hardware: Hardware, sequences: int, step_s: float, folds_per_token: float
    ) -> float:
        """Return folds' time in that of all steps, which give each of `sequences` one token."""
        return self.seconds(hardware) * sequences * folds_per_token / step_s


def folds_of_rollout(plan: FoldPlan, rollout_tokens: int) -> int:
    """Return how often a sequence folds until its answer has that many tokens.

    None before the window is full; and the last token is never computed.
    """
    return plan.folds(plan.pin_tokens + rollout_tokens - 2)


def fold_cost(model: Model, plan: FoldPlan, itemsize: float) -> FoldCost:
    """Count what one fold costs under a plan that keeps tokens.

    Args:
        model: The sizes of the model.
        plan: How the sequence folds.
        itemsize: Bytes of one number of the cache.
    """
    heads = model.layers * model.kv_heads
    keep, leave = plan.keep_tokens, plan.stride
    candidates = keep + leave
    numbers = heads * model.head_dim
    products = PROBES * (candidates + leave) + PROBES * candidates
    return FoldCost(
        window_tokens=plan.window_tokens,
        keep_tokens=keep,
        every_tokens=leave,
        read_bytes=4 * numbers * PROBES
        + itemsize * numbers * (candidates + leave + 2 * candidates + 2 * 2 * keep),
        written_bytes=itemsize * numbers * 2 * 2 * keep,
        operations=numbers * (2 * products + 2 * candidates),
        kept_bytes=itemsize * numbers * 2 * keep,
        record_bytes=-(-heads * candidates // 8),
    )
