"""What `pte-vllm plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pte_vllm.bench.sizing.hardware import Hardware
from pte_vllm.bench.sizing.keep_fold import KERNEL_LAUNCHES, SMALL_LAUNCHES, fold_cost
from pte_vllm.bench.sizing.model import Model
from pte_vllm.bench.sizing.roofline import Row
from pte_vllm.method.plan import FoldPlan


def show(
    model: Model,
    hardware: Hardware,
    rows: Sequence[Row],
    *,
    block_size: int,
    rank: int,
    rule: str,
    itemsize: float,
) -> dict[str, Any]:
    """Print tables; returns all of it for JSON."""
    console = Console()
    console.print(_bounds(rows))
    found: dict[str, Any] = {
        "hardware": asdict(hardware),
        "parameters": model.parameters,
        "weights_bytes": model.parameters * itemsize,
        "kv_bytes_per_token": model.kv_bytes(itemsize),
        "rows": [asdict(row) for row in rows],
    }
    about = (
        f"{hardware.name}: {model.parameters / 1e9:.2f} B parameters, "
        f"{found['kv_bytes_per_token'] / 1024:.0f} KiB of cache a token"
    )
    if rank:
        state = model.state_weight(rank, rule, itemsize).total
        found["state_bytes_per_sequence"] = state
        found["state_kv_tokens"] = state / model.kv_bytes(itemsize)
        found["adapter_push_bytes"] = model.adapter_bytes(rank, itemsize)
        about += (
            f"; a thought state (rank {rank}, {rule}) takes {state / 2**20:.2f} MiB, as much as "
            f"{found['state_kv_tokens']:.0f} tokens; a push sends "
            f"{found['adapter_push_bytes'] / 2**20:.0f} MiB"
        )
    keeping = [row for row in rows if row.keep_tokens]
    if keeping:
        table, found["folds"] = _folds(model, hardware, keeping, block_size, itemsize)
        console.print(table)
        about += (
            f". A fold takes {KERNEL_LAUNCHES} launches of kernels and {SMALL_LAUNCHES} small "
            "ones, for all layers and for all sequences that fold in the same step and hold as much"
        )
    console.print(
        f"{about}. Bounds, not promises: see `pte-vllm bench throughput` for what a machine does.",
        highlight=False,
        soft_wrap=True,
    )
    return found


def _bounds(rows: Sequence[Row]) -> Table:
    keeps = any(row.keep_tokens for row in rows)
    title = ("window", *(("keep",) if keeps else ()))
    table = Table(*title, "KV tokens", "sequences", "ms/step", "tok/s at most", "limit", "ratio")
    for row in rows:
        table.add_row(
            f"{row.window_tokens:,}" if row.window_tokens else "full attention",
            *((f"{row.keep_tokens:,}" if row.window_tokens else "",) if keeps else ()),
            f"{row.kv_tokens:,.0f}",
            f"{row.sequences:,}",
            f"{1e3 * row.step_s:.1f}",
            f"{row.tokens_per_s:,.0f}",
            row.limit,
            f"{row.ratio:.1f}",
        )
    return table


def _folds(
    model: Model,
    hardware: Hardware,
    rows: Sequence[Row],
    block_size: int,
    itemsize: float,
) -> tuple[Table, list[dict[str, Any]]]:
    """Show what one fold of one sequence costs in each row, and what all folds take of the time."""
    table = Table(
        "window", "keep", "kept MiB", "a fold every", "read MiB", "written MiB", "GFLOPs (fp32)",
        "ms at least", "share of the time", "record bytes", title="one fold of one sequence",
    )  # fmt: skip
    found = []
    for row in rows:
        plan = FoldPlan(
            pin_tokens=0,
            window_tokens=row.window_tokens,
            block_size=block_size,
            keep_tokens=row.keep_tokens,
        )
        cost = fold_cost(model, plan, itemsize)
        seconds = cost.seconds(hardware)
        share = cost.share_of_step(hardware, row.sequences, row.step_s)
        table.add_row(
            f"{row.window_tokens:,}",
            f"{row.keep_tokens:,}",
            f"{cost.kept_bytes / 2**20:.1f}",
            f"{cost.every_tokens:,} tokens",
            f"{cost.read_bytes / 2**20:.1f}",
            f"{cost.written_bytes / 2**20:.1f}",
            f"{cost.operations / 1e9:.2f}",
            f"{1e3 * seconds:.3f}",
            f"{share:.1%}",
            f"{cost.record_bytes:,}",
        )
        launches = {"kernel_launches": KERNEL_LAUNCHES, "small_launches": SMALL_LAUNCHES}
        found.append({**asdict(cost), **launches, "seconds": seconds, "share_of_step": share})
    return table, found
