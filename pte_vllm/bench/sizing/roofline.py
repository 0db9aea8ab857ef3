"""`pte-vllm plan`: what a window buys on given hardware, from a roofline.

A decoding step reads the weights once and every sequence's keys and values once, and computes two
operations for each weight and sequence; it takes as long as the slower of both. Rollouts are at all
stages at once, so under full attention a sequence holds half its final length on average. Standard
library only.

    tokens/s ≤ n / max((weights + n · (cache + S)) / bandwidth, n · operations / peak)

What a rule keeps beside S takes memory, but only folds read it. Kept tokens are read as the rest of
the cache is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pte_vllm.bench.sizing.hardware import Hardware
from pte_vllm.bench.sizing.model import Model
from pte_vllm.bench.sizing.ranks import kv_copies
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.weight import NO_STATE


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bounds for one way to hold the past."""

    window_tokens: int
    """0: full attention."""
    keep_tokens: int = 0
    """That each KV head keeps of those that left the window."""
    kv_tokens: float
    """That a sequence holds, on average; a window: at most."""
    sequences: int
    """That fit at once."""
    step_s: float
    tokens_per_s: float
    limit: str
    """`memory`: bandwidth; `compute`: operations."""
    ratio: float = 1.0
    """Against full attention."""


def plan_rows(
    model: Model,
    hardware: Hardware,
    *,
    rollout_tokens: int,
    prompt_tokens: int,
    windows: Sequence[int],
    keeps: Sequence[int] = (0,),
    block_size: int = 16,
    rank: int = 32,
    rule: str = "ridge",
    itemsize: float = 2,
    kv_itemsize: float | None = None,
    kv_memory_bytes: float | None = None,
    max_sequences: int | None = None,
    ranks: int = 1,
) -> list[Row]:
    """Full attention, then each window with each number of kept tokens.

    Args:
        rank: of the adapter; 0: there is none, so no state.
        itemsize: bytes of a weight.
        kv_itemsize: bytes of a number of the cache; None: as of a weight.
        kv_memory_bytes: the pool; None: 0.9 of the device, less weights and 4 GB to work in.
        max_sequences: `--max-num-seqs`, if it binds.
        ranks: devices that share out the model; each has room to work in, and every state.

    Raises:
        ValueError: if the weights leave no room, or a window does not fit the block size.
    """
    weights = model.parameters * itemsize
    pool = kv_memory_bytes
    if pool is None:
        pool = ranks * (0.9 * hardware.memory_bytes - 4e9) - weights
    if pool <= 0:
        raise ValueError(
            f"{weights / 1e9:.0f} GB of weights leave no room on {ranks} x {hardware.name} "
            f"({hardware.memory_bytes / 1e9:.0f} GB each)"
        )
    per_token = model.kv_bytes(kv_itemsize or itemsize) * kv_copies(model, ranks)

    def row(window_tokens: int, keep_tokens: int = 0) -> Row:
        if window_tokens:
            plan = FoldPlan(
                pin_tokens=prompt_tokens,
                window_tokens=window_tokens,
                block_size=block_size,
                keep_tokens=keep_tokens,
            )
            blocks = plan.pinned_blocks + plan.window_blocks + 1 + plan.keep_blocks
            tokens = min(float(blocks * block_size), prompt_tokens + float(rollout_tokens))
            state = model.state_weight(rank, rule, itemsize) if rank else NO_STATE
        else:
            tokens, state = prompt_tokens + rollout_tokens / 2, NO_STATE
        cache = tokens * per_token
        count = max(1, math.floor(pool / (cache + ranks * state.total)))
        if max_sequences is not None:
            count = min(count, max_sequences)
        read = weights + count * (cache + ranks * state.read)
        memory_s = read / (ranks * hardware.bandwidth)
        compute_s = count * 2 * model.parameters / (ranks * hardware.peak)
        step = max(memory_s, compute_s)
        return Row(
            window_tokens=window_tokens,
            keep_tokens=keep_tokens,
            kv_tokens=tokens,
            sequences=count,
            step_s=step,
            tokens_per_s=count / step,
            limit="compute" if compute_s > memory_s else "memory",
        )

    rows = [row(0), *(row(window, keep) for window in windows for keep in keeps)]
    base = rows[0].tokens_per_s
    return [Row(**{**asdict(r), "ratio": r.tokens_per_s / base}) for r in rows]
