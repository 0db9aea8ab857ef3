"""What `pte-vllm plan` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pte_vllm.bench.sizing.hardware import Hardware
from pte_vllm.bench.sizing.keep_fold import (
    KERNEL_LAUNCHES,
    SMALL_LAUNCHES,
    fold_cost,
    folds_of_rollout,
)
from pte_vllm.bench.sizing.model import Model
from pte_vllm.bench.sizing.ranks import fold_sums, state_sums, step_sums
from pte_vllm.bench.sizing.roofline import Row
from pte_vllm.method.plan import FoldPlan

PAIRS_A_TABLE = 3
"""Columns of windows and kept tokens that fit 80 characters."""


_QUANTITIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens between folds": lambda f: f"{f['every_tokens']:,}",
    "kept, MiB": lambda f: f"{f['kept_bytes'] / 2**20:.1f}",
    "read, MiB": lambda f: f"{f['read_bytes'] / 2**20:.1f}",
    "written, MiB": lambda f: f"{f['written_bytes'] / 2**20:.1f}",
    "GFLOPs in float32": lambda f: f"{f['operations'] / 1e9:.2f}",
    "ms at least": lambda f: f"{1e3 * f['seconds']:.3f}",
    "bytes of the record": lambda f: f"{f['record_bytes']:,}",
}
"""Of one fold: what each is called, and how it is shown."""


def show(
    model: Model,
    hardware: Hardware,
    rows: Sequence[Row],
    *,
    rollout_tokens: int,
    prompt_tokens: int,
    block_size: int,
    rank: int,
    rule: str,
    itemsize: float,
    kv_itemsize: float | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """Print tables; returns all of it for JSON."""
    console = Console()
    kv_bytes = model.kv_bytes(kv_itemsize or itemsize)
    console.print(_bounds(rows))
    found: dict[str, Any] = {
        "hardware": asdict(hardware),
        "parameters": model.parameters,
        "weights_bytes": model.parameters * itemsize,
        "kv_bytes_per_token": kv_bytes,
        "rows": [asdict(row) for row in rows],
    }
    devices = hardware.name if ranks == 1 else f"{ranks} x {hardware.name}"
    about = (
        f"{devices}: {model.parameters / 1e9:.2f} B parameters, "
        f"{found['kv_bytes_per_token'] / 1024:.0f} KiB of cache a token"
    )
    if rank:
        state = model.state_weight(rank, rule, itemsize).total
        found["state_bytes_per_sequence"] = state
        found["state_kv_tokens"] = state / kv_bytes
        found["adapter_push_bytes"] = model.adapter_bytes(rank, itemsize)
        about += (
            f"; a thought state (rank {rank}, {rule}) takes {state / 2**20:.2f} MiB, as much as "
            f"{found['state_kv_tokens']:.0f} tokens; a push sends "
            f"{found['adapter_push_bytes'] / 2**20:.0f} MiB"
        )
    keeping = [row for row in rows if row.keep_tokens]
    if keeping:
        plans = [_plan(row, prompt_tokens, block_size) for row in keeping]
        folds = [
            _fold(model, hardware, row, plan, rollout_tokens, kv_itemsize or itemsize, ranks)
            for row, plan in zip(keeping, plans, strict=True)
        ]
        found["folds"] = folds
        for start in range(0, len(folds), PAIRS_A_TABLE):
            console.print(_fold_table(folds[start : start + PAIRS_A_TABLE]))
        if any(not fold["folds_per_rollout"] for fold in folds):
            first = [
                f"at token {plan.first_fold:,} with a window of {plan.window_tokens:,}"
                for plan, fold in zip(plans, folds, strict=True)
                if not fold["folds_per_rollout"]
            ]
            console.print(
                f"Rollouts end at token {prompt_tokens + rollout_tokens:,}, before their first "
                f"fold ({', '.join(dict.fromkeys(first))}).",
                highlight=False,
                soft_wrap=True,
            )
        about += (
            f". A fold takes {KERNEL_LAUNCHES} launches of kernels and {SMALL_LAUNCHES} small "
            "ones, for all layers and for all sequences that fold in the same step and hold as much"
        )
    if ranks > 1:
        plans = [_plan(row, prompt_tokens, block_size) for row in rows if row.window_tokens]
        found["sums"] = _sums(model, plans, rank, itemsize)
        console.print(_sums_table(found["sums"], ranks))
    console.print(
        f"{about}. Bounds, not promises: see `pte-vllm bench throughput` for what a machine does.",
        highlight=False,
        soft_wrap=True,
    )
    return found


def _plan(row: Row, prompt_tokens: int, block_size: int) -> FoldPlan:
    return FoldPlan(
        pin_tokens=prompt_tokens,
        window_tokens=row.window_tokens,
        block_size=block_size,
        keep_tokens=row.keep_tokens,
    )


def _sums(
    model: Model, plans: Sequence[FoldPlan], rank: int, itemsize: float
) -> list[dict[str, Any]]:
    """Return what ranks add up, each with what its bytes are counted by."""
    found = [{"what": "a step, vLLM's own", **asdict(step_sums(model, itemsize)), "by": "token"}]
    if not rank:
        return found
    found.append({"what": "a step, states", **asdict(state_sums(model, rank)), "by": "token"})
    for tokens in sorted({plan.evict_blocks * plan.block_size for plan in plans}):
        plan = next(p for p in plans if p.evict_blocks * p.block_size == tokens)
        sums = {**asdict(fold_sums(model, plan, rank)), "by": "sequence that folds"}
        found.append({"what": f"a fold of {tokens:,} tokens", **sums})
    return found


def _sums_table(sums: Sequence[dict[str, Any]], ranks: int) -> Table:
    table = Table(title=f"what {ranks} ranks add up")
    for name in ("", "sums", "KiB", "by"):
        table.add_column(name, justify="right" if name in ("sums", "KiB") else "left")
    for row in sums:
        kib = f"{row['num_bytes'] / 2**10:,.1f}"
        table.add_row(row["what"], f"{row['count']:,}", kib, row["by"])
    return table


def _bounds(rows: Sequence[Row]) -> Table:
    keeps = any(row.keep_tokens for row in rows)
    title = ("window", *(("keep",) if keeps else ()), "KV\ntokens", "seqs", "ms/step")
    table = Table()
    for name in (*title, "tok/s\nat most", "limit", "ratio"):
        table.add_column(name, justify="left" if name == "limit" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row.window_tokens:,}" if row.window_tokens else "full",
            *((f"{row.keep_tokens:,}" if row.window_tokens else "",) if keeps else ()),
            f"{row.kv_tokens:,.0f}",
            f"{row.sequences:,}",
            f"{1e3 * row.step_s:.1f}",
            f"{row.tokens_per_s:,.0f}",
            row.limit,
            f"{row.ratio:.1f}",
        )
    return table


def _fold(
    model: Model,
    hardware: Hardware,
    row: Row,
    plan: FoldPlan,
    rollout_tokens: int,
    itemsize: float,
    ranks: int,
) -> dict[str, Any]:
    """Return what one fold of one sequence costs, and what all folds take of the time.

    Ranks share out the heads, and with them a fold's time.
    """
    cost = fold_cost(model, plan, itemsize)
    folds = folds_of_rollout(plan, rollout_tokens)
    per_token = folds / rollout_tokens
    return {
        **asdict(cost),
        "kernel_launches": KERNEL_LAUNCHES,
        "small_launches": SMALL_LAUNCHES,
        "seconds": cost.seconds(hardware) / ranks,
        "folds_per_rollout": folds,
        "share_of_step": cost.share_of_step(hardware, row.sequences, row.step_s, per_token) / ranks,
    }


def _fold_table(folds: Sequence[dict[str, Any]]) -> Table:
    """Show a column for each fold."""
    table = Table(title="one fold of one sequence")
    table.add_column("", overflow="fold")
    for fold in folds:
        heading = f"window {fold['window_tokens']:,}\nkeep {fold['keep_tokens']:,}"
        table.add_column(heading, justify="right", overflow="fold")
    table.add_row(
        "folds of a rollout",
        *(f"{f['folds_per_rollout']:,}" if f["folds_per_rollout"] else "no fold" for f in folds),
    )
    table.add_row("share of the time", *(f"{f['share_of_step']:.1%}" for f in folds))
    for name, show_one in _QUANTITIES.items():
        table.add_row(name, *(show_one(f) if f["folds_per_rollout"] else "–" for f in folds))
    return table
