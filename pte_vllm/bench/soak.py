"""`pte-vllm bench soak`: a server under mixed traffic for long; every error and all growth is told.

Chats, rollouts, scores and pushes with random windows, rules and lengths, some left before their
end, against a server of its own. Nothing may fail, and nothing may be left when all is done.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pte_vllm.bench import report
from pte_vllm.bench.traffic import KEPT_VERSIONS, Tally, Traffic
from pte_vllm.bench.turns import BLOCK_TOKENS, make_adapters
from pte_vllm.bench.watch import Growth, Series, Watch, growth, held
from pte_vllm.launch import Server

_KV_BYTES = 1 << 31
_KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_MAX_ERRORS = 20
"""After which it is not worth going on."""
_SAMPLES = 600
_SETTLE_S = 30.0
_B_SCALE = 0.05
"""Of the adapters: small enough that a real model still hesitates between tokens."""
_MIN_SURPRISE = 0.05
"""Mean −log p below which comparing rollouts with their scores says nothing."""
_MAX_DRIFT = {"float32": 1e-3}
_MAX_DRIFT_ELSE = 0.2
"""Mean |Δ log p| of a rollout and its score. In bf16 two batches round differently: about 0.03."""


def run(args: argparse.Namespace) -> int:
    """Returns 1 if anything failed or was left behind, else 0."""
    report.announce(args)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        adapters = [
            make_adapters(args, scratch / str(i), seed=i, b_scale=_B_SCALE)[0] for i in range(2)
        ]
        flags = [
            *("--pte-window", str(args.window), "--pte-max-prompt-tokens", "512"),
            *("--pte-spool", str(scratch / "spool"), "--pte-keep-versions", str(KEPT_VERSIONS)),
            *("--enable-lora", "--max-lora-rank", str(args.rank), "--max-loras", "4"),
            *("--dtype", args.dtype, "--block-size", str(BLOCK_TOKENS)),
            *(("--enforce-eager",) if args.eager else ()),
            *("--max-num-seqs", str(args.streams), "--max-model-len", "4096"),
            *("--num-gpu-blocks-override", str(args.pool + 1)),  # one is vLLM's null block
            *("--kv-cache-memory-bytes", str(_KV_BYTES)),
        ]
        log = args.out / "soak-server.log"
        # What oneDNN compiles for each new size of a matrix would pass for a leak (docs/api.md).
        env = {_KERNEL_CACHE: os.environ.get(_KERNEL_CACHE, "0")}
        with Server([args.model, *flags], log=log, env=env) as server:
            with report.console.status("starting the server"):
                server.wait_ready()
            tally, series = _load(args, server, adapters)
    return _report(args, tally, series)


def _load(args: argparse.Namespace, server: Server, adapters: list[str]) -> tuple[Tally, Series]:
    seconds = args.minutes * 60
    traffic = Traffic(
        server.url,
        adapters,
        streams=args.streams,
        every_s=args.every,
        tokens=args.tokens,
        window_tokens=args.window,
        max_drift=_MAX_DRIFT.get(args.dtype, _MAX_DRIFT_ELSE),
        seed=args.seed,
    )
    tally, began = traffic.tally, time.monotonic()
    watch = Watch(server, interval_s=max(0.5, seconds / _SAMPLES))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=report.console,
        transient=True,
    )

    def give_up() -> bool:
        bar.update(
            task,
            completed=time.monotonic() - began,
            description=f"{tally.done} answers, {len(tally.errors)} errors",
        )
        return len(tally.errors) >= _MAX_ERRORS or server.exit_status() is not None

    with bar, watch:
        task = bar.add_task("", total=seconds)
        asyncio.run(traffic.run(seconds, give_up=give_up))
    if watch.failure is not None:
        tally.errors.append(f"what the server holds could not be told: {watch.failure}")
    if server.exit_status() is not None:
        tally.errors.append(
            f"the server ended with status {server.exit_status()}; see {server.log}"
        )
    else:
        tally.errors += _left_behind(server)
    if tally.surprise and max(tally.surprise) < _MIN_SURPRISE:
        tally.errors.append(
            f"nothing was compared: the model is sure of every token (mean -log p "
            f"{max(tally.surprise):.1e} at most)"
        )
    if tally.unfolded and not max(tally.unfolded):
        tally.errors.append("scores do not depend on the plan")
    return tally, watch.series


def _left_behind(server: Server) -> list[str]:
    """What is still held although nobody asks for anything."""
    deadline = time.monotonic() + _SETTLE_S
    try:
        while any(found := held(server.url)) and time.monotonic() < deadline:
            time.sleep(0.5)
    except OSError as error:
        return [f"what the server holds could not be told: {error}"]
    if not any(found):
        return []
    blocks, slots, running = found
    return [f"left behind: {blocks} KV blocks, {slots} state slots, {running} requests"]


def _report(args: argparse.Namespace, tally: Tally, series: Series) -> int:
    console, seconds = report.console, args.minutes * 60
    table = Table("", "whole", "left", "per s", "p50, s", "p99, s")
    for kind, times in sorted(tally.seconds.items()):
        p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
        left = str(tally.left[kind]) if kind in tally.left else ""
        rate = f"{len(times) / seconds:.2f}"
        table.add_row(kind, str(len(times)), left, rate, f"{p50:.2f}", f"{p99:.2f}")
    console.print(table)
    trends = {n: growth(series.seconds, mib) for n, mib in series.resident_mib.items()}
    console.print(
        f"{tally.tokens / seconds:.0f} tok/s of whole answers; rollouts and their scores differ by "
        f"{max(tally.drift, default=math.nan):.1e} at most (scored without folds "
        f"{max(tally.unfolded, default=math.nan):.1e}); most in use: "
        f"{max(series.blocks, default=0)} of {args.pool} blocks, {max(series.slots, default=0)} "
        f"state slots",
        highlight=False,
    )
    for name, trend in trends.items():
        _say_growth(name, trend, series.resident_mib[name])
    for error in tally.errors[:_MAX_ERRORS]:
        console.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
    console.print(f"{len(tally.errors)} errors", highlight=False)
    stem = report.write(args, _results(tally, series, trends))
    minutes = [s / 60 for s in series.seconds]
    report.panels(
        stem,
        {
            "resident MiB": {n: (minutes, mib) for n, mib in series.resident_mib.items()},
            "in use": {
                "KV blocks": (minutes, series.blocks),
                "state slots": (minutes, series.slots),
            },
        },
        "minutes",
    )
    return 1 if tally.errors else 0


def _say_growth(name: str, trend: Growth, mib: Sequence[float]) -> None:
    warning = "[yellow]warning: it grows[/yellow], " if trend.significant else ""
    report.console.print(
        f"{name}: {mib[0]:.0f} to {mib[-1]:.0f} MiB; {warning}trend "
        f"{trend.mib_per_minute:+.2f} ± {trend.standard_error:.2f} MiB a minute",
        highlight=False,
    )


def _results(tally: Tally, series: Series, trends: dict[str, Growth]) -> dict[str, Any]:
    return {
        "errors": tally.errors,
        "tokens": tally.tokens,
        "left": dict(tally.left),
        "seconds": tally.seconds,
        "drift": tally.drift,
        "surprise": tally.surprise,
        "unfolded": tally.unfolded,
        "series": vars(series),
        "growth": {
            name: {
                "mib_per_minute": trend.mib_per_minute,
                "standard_error": trend.standard_error if trend.minutes else None,
                "significant": trend.significant,
            }
            for name, trend in trends.items()
        },
    }


def quantile(values: Sequence[float], part: float) -> float:
    """The value that `part` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(part * len(values)) - 1)]
