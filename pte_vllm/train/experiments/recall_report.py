"""Writes tables and plot of the recall experiment."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write(records: list[Record], out: Path) -> str:
    """Write recall.md and recall.png; returns the table."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["title"], []).append(record)
    text = _table(arms, "by_length", "tokens")
    if any(record["by_facts"] for record in records):
        text += "\n" + _table(arms, "by_facts", "facts")
    if any(record["perplexity"] for record in records):
        text += "\n" + _perplexities(arms)
    (out / "recall.md").write_text(text)
    _plot(arms, out / "recall.png")
    return text + f"\nwrote {out}/recall.md and recall.png"


def _values(runs: list[Record], kind: str, key: str, what: str) -> list[float]:
    return [{str(k): v for k, v in r[kind].items()}[key][what] for r in runs]


def _table(arms: dict[str, list[Record]], kind: str, unit: str) -> str:
    """Write a table of digits right and, in brackets, loss: means over seeds, ± half the range."""
    keys = [str(key) for key in next(iter(arms.values()))[0][kind]]
    lines = [
        "| arm | " + " | ".join(f"{key} {unit}" for key in keys) + " | seeds | s/step |",
        "|---" * (len(keys) + 3) + "|",
    ]
    for title, runs in arms.items():
        cells = []
        for key in keys:
            right = _values(runs, kind, key, "accuracy")
            lost = statistics.mean(_values(runs, kind, key, "loss"))
            spread = f" ± {(max(right) - min(right)) / 2:.3f}" if len(right) > 1 else ""
            cells.append(f"{statistics.mean(right):.3f}{spread} ({lost:.2f})")
        steps = [r["seconds"] / len(r["losses"]) for r in runs if r["losses"]]
        pace = f"{statistics.mean(steps):.1f}" if steps else "–"
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {len(runs)} | {pace} |")
    return "\n".join(lines) + "\n"


def _perplexities(arms: dict[str, list[Record]]) -> str:
    lines = ["| arm | perplexity of ordinary text beyond the first fold |", "|---|---|"]
    for title, runs in arms.items():
        values = [r["perplexity"] for r in runs]
        spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        lines.append(f"| {title} | {statistics.mean(values):.2f}{spread} |")
    return "\n".join(lines) + "\n"


def _plot(arms: dict[str, list[Record]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for title, runs in arms.items():
        keys = [str(key) for key in runs[0]["by_length"]]
        means = [statistics.mean(_values(runs, "by_length", k, "accuracy")) for k in keys]
        line = left.plot([int(k) for k in keys], means, marker="o", label=title)[0]
        for run in runs:
            smooth = [
                statistics.mean(run["losses"][max(0, i - 9) : i + 1])
                for i in range(len(run["losses"]))
            ]
            if smooth:
                right.plot(range(1, len(smooth) + 1), smooth, color=line.get_color(), alpha=0.8)
    left.set_xlabel("length of the sequence, tokens")
    left.set_ylabel("digits right")
    left.set_ylim(0, 1)
    left.legend(fontsize=8)
    right.set_xlabel("step")
    right.set_ylabel("training loss, mean of 10 steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
