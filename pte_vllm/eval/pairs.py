"""Arms that hold as much memory, compared with each other by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rich.table import Table

from pte_vllm.eval.results import Row, difference


def equal_pairs(
    rows: Sequence[Row], entries: Sequence[Mapping[str, Any]], *, block_tokens: int
) -> list[dict[str, Any]]:
    """Compare arms of one benchmark and length whose sequences weigh alike.

    Two arms weigh alike if they differ by less than half a block of KV cache, states included.

    Args:
        rows: The rows of a sweep.
        entries: What the report says of each of them, `kv_tokens` and `state_tokens` among it.
        block_tokens: Tokens of a block of KV cache.

    Returns:
        For each pair `arm`, `other`, their titles, and `difference`: accuracy of the first less
        that of the second, as `Mean.to_dict` has it.
    """
    found = []
    whole = [
        (row, entry)
        for row, entry in zip(rows, entries, strict=True)
        if row.answers and not row.error and entry["kv_tokens"] is not None
    ]
    for (row, entry), (other, another) in combinations(whole, 2):
        same = (row.benchmark, row.max_tokens) == (other.benchmark, other.max_tokens)
        apart = abs(_tokens(entry) - _tokens(another))
        if same and apart < block_tokens / 2:
            found.append(
                {
                    "benchmark": row.benchmark,
                    "max_tokens": row.max_tokens,
                    "arm": entry["title"],
                    "other": another["title"],
                    "difference": difference(row, other).to_dict(),
                }
            )
    return found


def _tokens(entry: Mapping[str, Any]) -> float:
    return float(entry["kv_tokens"] + entry["state_tokens"])


def pairs_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for the terminal."""
    table = Table("memory", "less another that holds as much", "[95 %]", title="equal memory")
    for pair in pairs:
        table.add_row(pair["arm"], pair["other"], _said(pair))
    return table


def pairs_markdown(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return the same as Markdown."""
    lines = ["| memory | less another that holds as much | [95 %] |", "| --- | --- | ---: |"]
    lines += [f"| {pair['arm']} | {pair['other']} | {_said(pair)} |" for pair in pairs]
    return "\n".join(lines)


def _said(pair: Mapping[str, Any]) -> str:
    mean = pair["difference"]
    return f"{mean['value']:+.3f} [{mean['low']:+.3f}, {mean['high']:+.3f}]"
