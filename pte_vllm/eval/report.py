"""Writes what a sweep found: a table on the terminal and as Markdown, JSON, and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pte_vllm import __version__
from pte_vllm.eval.arms import Pins
from pte_vllm.eval.options import RunOptions
from pte_vllm.eval.pairs import equal_pairs, pairs_markdown, pairs_table
from pte_vllm.eval.results import Row, difference, full_of
from pte_vllm.eval.serving import ServerFacts

RESULTS, TABLE = "results.json", "table.md"
BYTES_PLOT, TOKENS_PLOT = "bytes.png", "tokens.png"
_MIB = 1 << 20


def write_report(
    options: RunOptions,
    rows: Sequence[Row],
    facts: ServerFacts,
    weights: Mapping[str, int],
    pins: Mapping[str, Mapping[str, Pins]],
    out: Path,
    console: Console,
) -> None:
    """Write `results.json`, `table.md` and both plots below `out`, and print the tables."""
    found = [_entry(row, rows, facts, weights, pins.get(row.benchmark, {})) for row in rows]
    pairs = equal_pairs(rows, found, block_tokens=facts.block_size)
    summary = {
        "version": __version__,
        "model": options.model or facts.models[0],
        "options": {k: v for k, v in asdict(options).items() if k not in ("out", "api_key_env")},
        "server": asdict(facts),
        "state_bytes": dict(weights),
        "rows": found,
        "equal_memory": pairs,
    }
    (out / RESULTS).write_text(json.dumps(summary, indent=1, default=str) + "\n")
    pages = []
    for benchmark in options.benchmarks:
        for length in options.max_tokens:
            part = [e for e in found if (e["benchmark"], e["max_tokens"]) == (benchmark, length)]
            if not part:
                continue
            caption = f"{benchmark}, at most {length} tokens"
            console.print(terminal_table(part, title=caption))
            pages.append(f"## {caption}\n\n{markdown_table(part)}")
            alike = [p for p in pairs if (p["benchmark"], p["max_tokens"]) == (benchmark, length)]
            if alike:
                console.print(pairs_table(alike))
                pages.append(pairs_markdown(alike))
    (out / TABLE).write_text("\n\n".join(pages) + "\n")
    finished = [entry for entry in found if entry["accuracy"] is not None]
    written = [str(out / RESULTS), TABLE]
    if finished:
        from pte_vllm.eval.plots import plot_bytes, plot_tokens

        plot_bytes(finished, out / BYTES_PLOT)
        plot_tokens(rows, out / TOKENS_PLOT)
        written += [BYTES_PLOT, TOKENS_PLOT]
    console.print(
        f"wrote {', '.join(written)}\nevery answer: inspect view --log-dir {out / 'logs'}",
        soft_wrap=True,
    )


def _entry(
    row: Row,
    rows: Sequence[Row],
    facts: ServerFacts,
    weights: Mapping[str, int],
    pins: Mapping[str, Pins],
) -> dict[str, Any]:
    """Return a row as JSON values: what the table shows, and accuracy by problem."""
    entry: dict[str, Any] = {
        "benchmark": row.benchmark,
        "arm": row.key,
        "title": row.title,
        "max_tokens": row.max_tokens,
        "error": row.error,
        "accuracy": None,
        "kv_tokens": None,
    }
    if not row.answers:
        return entry
    arm, state_bytes = row.arm, 0
    if arm is not None and arm.adapter and arm.adapter in weights and arm.window_tokens:
        state_bytes = weights[arm.adapter]
    tokens = row.peak_tokens(block_size=facts.block_size, evict_ratio=facts.evict_ratio, pins=pins)
    token_bytes = facts.kv_bytes_per_token
    full = full_of(rows, row)
    return entry | {
        "accuracy": row.accuracy().to_dict(),
        "pass_at": {str(k): value for k, value in sorted(row.pass_at.items())},
        "difference": difference(row, full).to_dict() if full else None,
        "answers": len(row.answers),
        "kv_tokens": tokens,
        "state_bytes": state_bytes,
        "state_tokens": state_bytes / token_bytes if token_bytes else 0.0,
        "bytes": tokens * token_bytes + state_bytes if token_bytes else None,
        "prompt_tokens": math.fsum(a.prompt_tokens for a in row.answers) / len(row.answers),
        "answer_tokens": row.answer_tokens(),
        "cut": row.cut(),
        "seconds": row.seconds,
        "by_problem": row.by_problem(),
    }


def _cells(entry: Mapping[str, Any], ks: Sequence[str], with_bytes: bool) -> list[str]:
    accuracy = entry["accuracy"]
    if accuracy is None:
        blank = [""] * (5 + len(ks) + with_bytes)
        return [entry["title"], f"failed: {entry['error']}"[:160], *blank]
    cells = [entry["title"], f"{accuracy['value']:.3f} {_interval(accuracy)}"]
    if entry["error"]:
        cells[1] += f" (not complete: {entry['error']})"[:160]
    change = entry["difference"]
    cells.append("" if change is None else f"{change['value']:+.3f} {_interval(change, '+')}")
    cells += [f"{entry['pass_at'].get(k, math.nan):.3f}" for k in ks]
    cells.append(f"{entry['kv_tokens']:.0f}")
    if with_bytes:
        cells.append(f"{entry['bytes'] / _MIB:.2f}")
    cells += [f"{entry['answer_tokens']:.0f}", f"{entry['cut']:.0%}", str(accuracy["count"])]
    return cells


def _interval(mean: Mapping[str, float], sign: str = "") -> str:
    return f"[{mean['low']:{sign}.3f}, {mean['high']:{sign}.3f}]"


def _columns(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str], bool]:
    ks = sorted({k for e in entries for k in e.get("pass_at", {})}, key=int)
    with_bytes = any(e.get("bytes") is not None for e in entries)
    names = ["memory", "accuracy [95 %]", "less full cache [95 %]"]
    names += [f"pass@{k}" for k in ks]
    names += ["KV tokens", *(["MiB"] if with_bytes else []), "answer", "cut", "problems"]
    return names, ks, with_bytes


def terminal_table(entries: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Return the table of one benchmark at one length for the terminal."""
    names, ks, with_bytes = _columns(entries)
    table = Table(title=title)
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if not place else "right", overflow="fold")
    for entry in entries:
        table.add_row(*_cells(entry, ks, with_bytes))
    return table


def markdown_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the same table as Markdown."""
    names, ks, with_bytes = _columns(entries)
    lines = [names, ["---", *["---:"] * (len(names) - 1)]]
    lines += [_cells(entry, ks, with_bytes) for entry in entries]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
