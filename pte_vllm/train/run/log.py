"""Shows and keeps the numbers of a run by step: JSON lines, TensorBoard, a progress bar, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "training.png"

_SHOWN = (
    ("reward", "reward {:.3f}"),
    ("length", "len {:.0f}"),
    ("folds", "folds {:.1f}"),
    ("rho", "ρ {:.2f}"),
    ("kl", "KL {:.1e}"),
    ("clipped", "clip {:.1%}"),
    ("entropy", "H {:.2f}"),
    ("importance_mean", "w {:.2f}"),
    ("importance_max", "max {:.2f}"),
    ("drift", "drift {:.0e}"),
    ("tokens_per_s", "{:.0f} tok/s"),
)
"""What the progress bar says, and how; numbers that a step does not have are left out."""


class MetricsLog:
    """Keeps numbers by step on disk.

    Args:
        directory: the run's directory; its `metrics.jsonl` holds an object a step, without numbers
            that are not finite.
        step: how many steps are done; records of later ones, from before an interruption, are
            dropped.
        tensorboard: whether to write events too, below `tensorboard/`.
    """

    def __init__(self, directory: Path, *, step: int, tensorboard: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        self.records: list[dict[str, float]] = []
        if step:
            self.records = [r for r in read_metrics(self._path) if r["step"] <= step]
        draft = self._path.with_suffix(".draft")
        draft.write_text("".join(map(_line, self.records)), encoding="utf-8")
        draft.replace(self._path)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        record = {"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}}
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        if self._writer is not None:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a `metrics.jsonl`; [] if there is none. A line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record) + "\n"


class ProgressBar:
    """Shows steps done and left, and the last step's numbers; a line a step without a terminal."""

    def __init__(self, console: Console, *, title: str, done: int, total: int) -> None:
        self._console, self._total = console, total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, shown="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` is done, and its numbers."""
        self.show(step, summary(values))

    def show(self, step: int, shown: str) -> None:
        """Show that `step` is done, and a text beside it."""
        self._progress.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total}: {shown}", soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, soft_wrap=True)


def summary(values: Mapping[str, float]) -> str:
    """Write a step's numbers in one line."""
    return " · ".join(
        form.format(values[name])
        for name, form in _SHOWN
        if name in values and math.isfinite(values[name])
    )


def plot_run(records: Sequence[Mapping[str, float]], path: Path, *, title: str = "") -> None:
    """Plot reward, length and drift by step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.4))
    for axes, (name, label) in zip(
        panels,
        (
            ("reward", "mean reward"),
            ("length", "tokens of an answer"),
            ("drift", "mean |Δ log p|, server and replay"),
        ),
        strict=True,
    ):
        steps, values = series(records, name)
        axes.plot(steps, values, color="tab:blue", linewidth=1, alpha=0.4)
        axes.plot(steps, smooth(values), color="tab:blue")
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
    if any(value > 0 for value in series(records, "drift")[1]):
        panels[2].set_yscale("log")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def series(records: Sequence[Mapping[str, float]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one number, from the records that have it."""
    pairs = [(int(r["step"]), r[name]) for r in records if name in r]
    return [s for s, _ in pairs], [v for _, v in pairs]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Compute the exponential moving average, corrected for its start."""
    found, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        found.append(total / norm)
    return found
