"""Plots of a sweep: accuracy over the cache that it took, and over generated tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pte_vllm.eval.results import Row

_MIB = 1 << 20


def plot_bytes(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot accuracy over KV bytes of a sequence, its state included, as a PNG.

    One panel for each benchmark and length, one line for each kind of memory; tokens instead of
    bytes where the server does not say what a token weighs.

    Args:
        entries: rows of `results.json` that have an accuracy.
        path: the file to write.
    """
    panels = sorted({(e["benchmark"], e["max_tokens"]) for e in entries})
    figure, axes = _panels(len(panels))
    for axis, (benchmark, length) in zip(axes, panels, strict=True):
        part = [e for e in entries if (e["benchmark"], e["max_tokens"]) == (benchmark, length)]
        in_bytes = all(e["bytes"] is not None for e in part)
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for entry in part:
            lines.setdefault(_kind(entry["title"]), []).append(entry)
        for kind, points in lines.items():
            points.sort(key=lambda e: e["kv_tokens"])
            x = [e["bytes"] / _MIB if in_bytes else e["kv_tokens"] for e in points]
            y = [e["accuracy"]["value"] for e in points]
            error = [
                [max(0.0, v - e["accuracy"]["low"]) for v, e in zip(y, points, strict=True)],
                [max(0.0, e["accuracy"]["high"] - v) for v, e in zip(y, points, strict=True)],
            ]
            axis.errorbar(x, y, yerr=error, marker="o", capsize=3, alpha=0.8, label=kind)
        unit = "MiB" if in_bytes else "tokens"
        axis.set_xlabel(f"KV cache of a sequence, {unit}, thought state included")
        axis.set_ylabel("accuracy")
        axis.set_title(f"{benchmark}, at most {length} tokens")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.08)
        axis.legend(fontsize="small")
    _save(figure, path)


def plot_tokens(rows: Sequence[Row], path: Path) -> None:
    """Plot the share of problems that answers of at most so many tokens solve, as a PNG.

    One run gives the whole curve: an answer that was solved in 300 tokens is solved at any limit
    from there on. Answers that were cut count as not solved.
    """
    rows = [row for row in rows if row.answers]
    panels = sorted({(row.benchmark, row.max_tokens) for row in rows})
    figure, axes = _panels(len(panels))
    for axis, (benchmark, length) in zip(axes, panels, strict=True):
        for place, row in enumerate(rows):
            if (row.benchmark, row.max_tokens) != (benchmark, length):
                continue
            ends = sorted({0, *(a.answer_tokens for a in row.answers if not a.cut), length})
            axis.step(
                ends,
                [row.solved_within(n) for n in ends],
                where="post",
                label=row.title,
                linestyle=("-", "--", "-.", ":")[place % 4],  # lines may lie on each other
            )
        axis.set_xlabel("generated tokens")
        axis.set_ylabel("share solved within them")
        axis.set_title(f"{benchmark}, at most {length} tokens")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small")
    _save(figure, path)


def _kind(title: str) -> str:
    """Return what a memory is, without the size of its window."""
    return title if title.startswith("full") or "," not in title else title.split(", ", 1)[1]


def _panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(count, 3)
    lines = -(-count // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(6.5 * columns, 4.2 * lines), squeeze=False
    )
    axes = [axis for line in grid for axis in line]
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
