"""What a benchmark prints and writes: a table, JSON with everything behind it, a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()


def machine() -> str:
    """The hardware, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def announce(args: argparse.Namespace) -> None:
    options = ", ".join(
        f"{name} {value}" for name, value in vars(args).items() if name not in ("what", "out")
    )
    console.print(f"{args.what}: {options}; {machine()}", highlight=False)


def rates(values: Mapping[str, Sequence[float]], unit: str) -> Table:
    """Median, spread and ratio to the first row, by arm."""
    table = Table("arm", f"{unit}, median", "min to max", "ratio to the first")
    base = statistics.median(next(iter(values.values())))
    for name, runs in values.items():
        median = statistics.median(runs)
        spread = f"{min(runs):.1f} to {max(runs):.1f}"
        table.add_row(name, f"{median:.1f}", spread, f"{median / base:.2f}")
    return table


def write(args: argparse.Namespace, results: dict[str, Any]) -> Path:
    """`results` with the machine and the options beside them; returns the stem of the files."""
    options = {name: str(value) for name, value in vars(args).items()}
    stem: Path = args.out / args.what
    content = {"machine": machine(), "options": options, **results}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return stem


def bars(stem: Path, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Median of each arm as a bar, with the spread."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(values) + 1.2), layout="constrained")
    medians = [statistics.median(runs) for runs in values.values()]
    spread = [
        [m - min(runs) for m, runs in zip(medians, values.values(), strict=True)],
        [max(runs) - m for m, runs in zip(medians, values.values(), strict=True)],
    ]
    axes.barh(list(values), medians, xerr=spread, capsize=3, color="#4878a8")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _save(figure, stem)


def lines(
    stem: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> None:
    """One line for each name, `(xs, ys)`."""
    figure, axes = _pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o" if len(xs) < 30 else None, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, stem)


def panels(
    stem: Path,
    rows: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    x: str,
) -> None:
    """One plot below the other, by what it shows; in each one line for each name, `(xs, ys)`."""
    figure, all_axes = _pyplot().subplots(
        len(rows), figsize=(8, 2.6 * len(rows)), layout="constrained", sharex=True, squeeze=False
    )
    for axes, (y, series) in zip(all_axes[:, 0], rows.items(), strict=True):
        for name, (xs, ys) in series.items():
            axes.plot(xs, ys, linewidth=1, label=name)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=8)
    all_axes[-1, 0].set_xlabel(x)
    _save(figure, stem)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=110)
    _pyplot().close(figure)
    console.print(f"wrote {stem}.json and .png", highlight=False)
