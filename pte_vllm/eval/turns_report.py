"""Tables and plot of `pte-vllm eval turns`: accuracy by turns since the telling, blocks by turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pte_vllm.eval.results import Share

Record = dict[str, Any]


def write(records: Sequence[Record], block_size: int, out: Path) -> str:
    """Write `turns.json`, `turns.md` and `turns.png` below `out`; returns the tables.

    Args:
        records: what `turns_run.hold_all` returned: every conversation under every memory.
        block_size: tokens in a KV block of the server.
        out: a directory that exists.
    """
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["title"], []).append(record)
    found = {title: _summary(talks) for title, talks in arms.items()}
    talks = len(next(iter(arms.values())))
    turns = len(records[0]["turns"])
    text = (
        f"{talks} conversations of {turns} turns, blocks of {block_size} tokens; right answers by "
        "turns between telling and asking.\n\n"
    )
    text += _accuracies(found) + "\n" + _blocks(found) + "\n"
    settings = records[0]["settings"]
    (out / "turns.json").write_text(json.dumps({"settings": settings, "arms": found}, indent=1))
    (out / "turns.md").write_text(text)
    _plot(found, out / "turns.png")
    return text + f"wrote {out}/turns.json, turns.md and turns.png; every answer: {out}/talks"


def _summary(talks: Sequence[Record]) -> Record:
    """Return what the conversations of one memory come to."""
    asked = [turn for talk in talks for turn in talk["turns"] if turn["wanted"] is not None]
    distances = sorted({turn["distance"] for turn in asked})
    by_turn = list(zip(*(talk["turns"] for talk in talks), strict=True))
    return {
        "right": _share([turn["right"] for turn in asked]),
        "by_distance": {
            str(distance): _share([t["right"] for t in asked if t["distance"] == distance])
            for distance in distances
        },
        "tokens_by_turn": [
            sum(turn["prompt_tokens"] for turn in turns) / len(turns) for turns in by_turn
        ],
        "blocks_by_turn": [
            max((turn["blocks"] for turn in turns if turn["blocks"] is not None), default=None)
            for turns in by_turn
        ],
    }


def _share(right: Sequence[bool]) -> Record:
    """Return the share of right answers, with Wilson's interval of 95 %."""
    value = sum(right) / len(right)
    return Share(value=value, stderr=0.0, count=len(right)).to_dict()


def _accuracies(found: dict[str, Record]) -> str:
    distances = list(next(iter(found.values()))["by_distance"])
    counts = [entry["count"] for entry in next(iter(found.values()))["by_distance"].values()]
    heads = [f"{d} (n = {n})" for d, n in zip(distances, counts, strict=True)]
    lines = [f"| memory | {' | '.join(heads)} | all [95 %] |", "|---" * (len(heads) + 2) + "|"]
    for title, arm in found.items():
        cells = [f"{arm['by_distance'][distance]['value']:.2f}" for distance in distances]
        every = arm["right"]
        cells.append(f"{every['value']:.3f} [{every['low']:.3f}, {every['high']:.3f}]")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _blocks(found: dict[str, Record]) -> str:
    """Write a table of the most blocks that any conversation held at some of the turns."""
    count = len(next(iter(found.values()))["blocks_by_turn"])
    shown = sorted({turn for turn in (1, 5, 10, 20, 30, 40, 50, count) if turn <= count})
    lines = [
        "| memory | " + " | ".join(f"blocks at turn {turn}" for turn in shown) + " | most |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for title, arm in found.items():
        held = arm["blocks_by_turn"]
        known = [blocks for blocks in held if blocks is not None]
        cells = ["–" if held[turn - 1] is None else str(held[turn - 1]) for turn in shown]
        cells.append(str(max(known, default="–")))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(found: dict[str, Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for title, arm in found.items():
        by_distance = arm["by_distance"]
        shares = [entry["value"] for entry in by_distance.values()]
        line = left.plot([int(d) for d in by_distance], shares, marker="o")[0]
        held = [(i, b) for i, b in enumerate(arm["blocks_by_turn"], 1) if b is not None]
        right.plot([i for i, _ in held], [b for _, b in held], color=line.get_color(), label=title)
    left.set_xlabel("turns since the telling")
    left.set_ylabel("right answers")
    left.set_ylim(-0.03, 1.03)
    right.set_xlabel("turn")
    right.set_ylabel("KV blocks, the most of any conversation")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
