"""Says how far a long piece of work is, on a terminal and in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import Progress

QUIET_S = 30.0
"""Longest time without a line, without a terminal."""


def counter(progress: Progress, name: str, total: int, *, before: int = 0) -> Callable[[int], None]:
    """Add a bar to `progress`, and return what takes how many more are done.

    Without a terminal there is a line for every tenth, and after `QUIET_S` at the latest.

    Args:
        progress: where it is shown; disabled without a terminal.
        name: what is counted.
        total: how many there are in all.
        before: how many of them were done in an earlier run.
    """
    task, done = progress.add_task(name, total=total, completed=before), before
    began = said = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        tenths, done = 10 * done // total, done + count
        progress.advance(task, count)
        now = time.monotonic()
        if not progress.console.is_terminal and (
            10 * done // total > tenths or now - said > QUIET_S
        ):
            said, left = now, (now - began) * (total - done) / (done - before)
            rest = f", about {left:.0f} s left" if done < total else ""
            progress.console.print(f"{name}: {done} of {total}{rest}")

    return advance


def counters(progress: Progress, title: str) -> Callable[[str, int, int], None]:
    """Return what takes the name of a stage, how much of it is done, and how much it is in all.

    Bars appear with the first call, named `title: stage`.
    """
    bars: dict[str, Callable[[int], None]] = {}
    told: dict[str, int] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = counter(progress, f"{title}: {stage}", total)
        bars[stage](done - told.get(stage, 0))
        told[stage] = done

    return show
