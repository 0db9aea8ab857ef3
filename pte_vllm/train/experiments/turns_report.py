"""Tables and plot of the experiment about conversations: accuracy by turns since the telling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pte_vllm.train.experiments.memory_report import by_arm, plot, summary, table


def write(result: dict[str, Any], out: Path, name: str) -> str:
    """Write `name`.md and `name`.png below `out`; returns the tables.

    Args:
        result: what `arm_runs.run_and_report` saves: `budget`, `bytes` and `runs`, and the seconds.
        out: a directory that exists.
        name: of the files.
    """
    budget = result["budget"]
    arms = by_arm(result["runs"], ("turns",))
    low, high = budget["distances"]
    cells = [(turns,) for turns in budget["eval_distances"]]
    text = (
        f"Share of right answers in conversations of {budget['eval_turns']} turns with "
        f"{budget['eval_facts']} questions, by turns between telling and asking; trained on {low} "
        f"to {high} turns.\n\n"
    )
    text += summary(arms, budget["tasks"], cells, (low, high), "turn", result["bytes"]) + "\n"
    for task in budget["tasks"]:
        text += f"**{task}**, by turns since the telling\n\n"
        text += table(arms, task, cells, lambda cell: str(cell[0])) + "\n"
    text += f"{result['seconds']:.0f} s in all\n"
    (out / f"{name}.md").write_text(text)
    label = "turns since the telling"
    plot(arms, budget["tasks"], cells, (low, high), label, out / f"{name}.png")
    return text
