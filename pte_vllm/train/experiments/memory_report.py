"""Tables and plot of the memory experiment: accuracy by gap and by number of facts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Cell = tuple[int, ...]
"""Where accuracy is measured: a gap in tokens and a number of facts, or a number of turns."""
Arms = dict[str, list[dict[tuple[Any, ...], float]]]
"""By arm the accuracies of each seed, by task and cell."""


def write(result: dict[str, Any], out: Path, name: str) -> str:
    """Write `name`.md and `name`.png below `out`; returns the tables.

    Args:
        result: what `memory.main` saves: `budget`, `bytes` and `runs`, and the seconds they took.
    """
    arms = by_arm(result["runs"], ("gap_tokens", "facts"))
    low, high = result["budget"]["gap_tokens"]
    facts = result["budget"]["eval_facts"]
    gaps = [(gap, facts[0]) for gap in result["budget"]["eval_gaps"]]
    text = f"Share of right answers; trained gaps {low} to {high} tokens, {facts[0]} facts.\n\n"
    tasks = result["budget"]["tasks"]
    text += summary(arms, tasks, gaps, (low, high), "gap", result["bytes"]) + "\n"
    for task in tasks:
        text += f"**{task}**\n\n" + table(arms, task, gaps, lambda cell: f"gap {cell[0]}") + "\n"
        if len(facts) > 1:
            cells = [(result["budget"]["eval_gaps"][1], count) for count in sorted(facts)]
            text += table(arms, task, cells, lambda cell: f"{cell[1]} facts") + "\n"
    text += f"{result['seconds']:.0f} s in all\n"
    (out / f"{name}.md").write_text(text)
    plot(arms, tasks, gaps, (low, high), "gap, tokens", out / f"{name}.png")
    return text


def by_arm(runs: list[dict[str, Any]], fields: Sequence[str]) -> Arms:
    """Return by arm the accuracies of each seed; a cell is made of these fields of a score."""
    arms: Arms = {}
    for record in runs:
        scores = {
            (s["task"], *(s[field] for field in fields)): s["accuracy"] for s in record["scores"]
        }
        arms.setdefault(record["arm"], []).append(scores)
    return arms


def summary(
    arms: Arms,
    tasks: Sequence[str],
    cells: Sequence[Cell],
    trained: tuple[int, int],
    what: str,
    held: dict[str, dict[str, int]],
) -> str:
    """Write a table of arms: by task the mean over trained cells and the farthest cell; bytes.

    Args:
        arms: what `by_arm` returned.
        tasks: which of its tasks.
        cells: by ascending distance, their first number.
        trained: least and greatest distance that was trained.
        what: names a distance.
        held: by arm the bytes of `kv` and of `state`.
    """
    inside = [cell for cell in cells if trained[0] <= cell[0] <= trained[1]]
    far = cells[-1]
    lines = [
        f"| arm | {' | '.join(f'{task}, trained {what}s; {what} {far[0]}' for task in tasks)} "
        "| bytes of KV + state |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for arm, seeds in arms.items():
        row = []
        for task in tasks:
            near = statistics.mean(scores[task, *cell] for scores in seeds for cell in inside)
            last = statistics.mean(scores[task, *far] for scores in seeds)
            row.append(f"{near:.2f}; {last:.2f}")
        row.append(f"{held[arm]['kv']:,} + {held[arm]['state']:,}")
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def table(arms: Arms, task: str, cells: Sequence[Cell], title: Callable[[Cell], str]) -> str:
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


def plot(
    arms: Arms,
    tasks: Sequence[str],
    cells: Sequence[Cell],
    trained: tuple[int, int],
    label: str,
    path: Path,
) -> None:
    """Draw accuracy over distance, a panel for each task.

    Args:
        arms: what `by_arm` returned.
        tasks: which of its tasks.
        cells: by ascending distance, their first number.
        trained: least and greatest distance that was trained, which are shaded.
        label: of the axis of distances.
        path: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(4.2 * len(tasks), 3.8), sharey=True, squeeze=False
    )
    for task, axis in zip(tasks, axes[0], strict=True):
        for i, (arm, seeds) in enumerate(arms.items()):
            means = [statistics.mean(scores[task, *cell] for scores in seeds) for cell in cells]
            # Ten colours, then the same ones dashed: ablations have some thirty arms.
            look = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
            axis.plot([cell[0] for cell in cells], means, marker="o", label=arm, **look)
        axis.axvspan(*trained, alpha=0.08, color="black")
        axis.set_title(task)
        axis.set_xlabel(label)
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers (shaded: trained)")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
