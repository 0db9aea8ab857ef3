"""Tables and plot of the memory experiment: accuracy by gap and by number of facts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Key = tuple[str, int, int]
"""A task, a gap in tokens, and a number of facts."""


def write(result: dict[str, Any], out: Path, name: str) -> str:
    """Write `name`.md and `name`.png below `out`; returns the tables.

    Args:
        result: what `memory.main` saves: `budget`, `bytes` and `runs`, and the seconds they took.
    """
    arms = _by_arm(result["runs"])
    low, high = result["budget"]["gap_tokens"]
    facts = result["budget"]["eval_facts"]
    gaps = [(gap, facts[0]) for gap in result["budget"]["eval_gaps"]]
    text = f"Share of right answers; trained gaps {low} to {high} tokens, {facts[0]} facts.\n\n"
    text += _summary(arms, result["budget"]["tasks"], gaps, (low, high), result["bytes"]) + "\n"
    for task in result["budget"]["tasks"]:
        text += f"**{task}**\n\n" + _table(arms, task, gaps, lambda cell: f"gap {cell[0]}") + "\n"
        if len(facts) > 1:
            cells = [(result["budget"]["eval_gaps"][1], count) for count in sorted(facts)]
            text += _table(arms, task, cells, lambda cell: f"{cell[1]} facts") + "\n"
    text += f"{result['seconds']:.0f} s in all\n"
    (out / f"{name}.md").write_text(text)
    _plot(arms, result["budget"]["tasks"], gaps, (low, high), out / f"{name}.png")
    return text


def _by_arm(runs: list[dict[str, Any]]) -> dict[str, list[dict[Key, float]]]:
    """Return by arm the accuracies of each seed."""
    arms: dict[str, list[dict[Key, float]]] = {}
    for record in runs:
        scores = {(s["task"], s["gap_tokens"], s["facts"]): s["accuracy"] for s in record["scores"]}
        arms.setdefault(record["arm"], []).append(scores)
    return arms


def _summary(
    arms: dict[str, list[dict[Key, float]]],
    tasks: list[str],
    gaps: list[tuple[int, int]],
    trained: tuple[int, int],
    held: dict[str, dict[str, int]],
) -> str:
    """Write a table of arms: by task the mean over trained gaps and the longest gap; bytes."""
    inside = [cell for cell in gaps if trained[0] <= cell[0] <= trained[1]]
    lines = [
        f"| arm | {' | '.join(f'{task}, trained gaps; gap {gaps[-1][0]}' for task in tasks)} "
        "| bytes of KV + state |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for arm, seeds in arms.items():
        row = []
        for task in tasks:
            near = statistics.mean(scores[task, *cell] for scores in seeds for cell in inside)
            far = statistics.mean(scores[task, *gaps[-1]] for scores in seeds)
            row.append(f"{near:.2f}; {far:.2f}")
        row.append(f"{held[arm]['kv']:,} + {held[arm]['state']:,}")
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _table(
    arms: dict[str, list[dict[Key, float]]], task: str, cells: list[tuple[int, int]], title: Any
) -> str:
    """Write a table of one task: means over seeds, ± half the range where there are several."""
    lines = ["| arm | " + " | ".join(map(title, cells)) + " |", "|---" * (len(cells) + 1) + "|"]
    for arm, seeds in arms.items():
        row = []
        for cell in cells:
            values = [scores[task, *cell] for scores in seeds]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _plot(
    arms: dict[str, list[dict[Key, float]]],
    tasks: list[str],
    gaps: list[tuple[int, int]],
    trained: tuple[int, int],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(4.2 * len(tasks), 3.8), sharey=True, squeeze=False
    )
    for task, axis in zip(tasks, axes[0], strict=True):
        for i, (arm, seeds) in enumerate(arms.items()):
            means = [statistics.mean(scores[task, *cell] for scores in seeds) for cell in gaps]
            # Ten colours, then the same ones dashed: ablations have some thirty arms.
            look = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
            axis.plot([gap for gap, _ in gaps], means, marker="o", label=arm, **look)
        axis.axvspan(*trained, alpha=0.08, color="black")
        axis.set_title(task)
        axis.set_xlabel("gap, tokens")
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers (shaded: trained gaps)")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
