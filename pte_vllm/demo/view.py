"""What `pte-vllm demo` shows: samples of each chat, the live table, the summary and the plot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

BLOCK_SIZE = 32
"""`--block-size` of the demo's server."""


# -- figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """It holds one poll of one stream."""

    seconds: float
    num_tokens: int
    held_blocks: int
    folds: int


@dataclass(kw_only=True)
class Stream:
    """It holds one chat: what was asked, and what the server said about it."""

    name: str
    prompt: str
    windowed: bool
    seed: int
    response_id: str | None = None
    text: str = ""
    completion_tokens: int = 0
    peak_blocks: int = 0
    seconds: float = 0.0
    """It counts from the request to its last token."""
    samples: list[Sample] = field(default_factory=list)
    done: bool = False

    @property
    def mode(self) -> str:
        return "window" if self.windowed else "full"

    @property
    def latest(self) -> Sample:
        return self.samples[-1] if self.samples else Sample(0.0, 0, 0, 0)


def full_blocks(num_tokens: int) -> int:
    """Count the KV blocks of `num_tokens` under full attention."""
    return -(-num_tokens // BLOCK_SIZE)


def saved_percent(held_blocks: int, full: int) -> float:
    """Return how many percent of the full-attention blocks are not held; 0 before the first."""
    return 100.0 * (1.0 - held_blocks / full) if full else 0.0


def tokens_per_s(samples: Sequence[Sample], span_s: float = 5.0) -> float:
    """Return the rate over the last `span_s` seconds of samples; 0 while there are under two."""
    if len(samples) < 2:
        return 0.0
    last = samples[-1]
    first = next(s for s in samples if s.seconds >= last.seconds - span_s or s is samples[-2])
    elapsed = last.seconds - first.seconds
    return (last.num_tokens - first.num_tokens) / elapsed if elapsed > 0 else 0.0


def find_record(report: dict[str, Any], response_id: str) -> dict[str, Any] | None:
    """Find the request behind a response id; the engine's id is that id and a random suffix."""
    for record in [*report["running"], *report["finished"]]:
        if record["request_id"].startswith(response_id):
            found: dict[str, Any] = record
            return found
    return None


def take_sample(stream: Stream, report: dict[str, Any], seconds: float) -> None:
    """Add what `GET /pte/v1/requests` says about a stream, if it says anything."""
    if stream.response_id is None:
        return
    record = find_record(report, stream.response_id)
    if record is None:
        return
    stream.peak_blocks = max(stream.peak_blocks, record["peak_blocks"])
    running = record in report["running"]  # a finished request holds nothing any more
    held = record["held_blocks"] if running else stream.latest.held_blocks
    if running or stream.latest.num_tokens < record["num_tokens"]:
        stream.samples.append(Sample(seconds, record["num_tokens"], held, record["folds"]))


# -- what the user sees ----------------------------------------------------------------------------


def live_table(streams: Sequence[Stream], report: dict[str, Any]) -> Table:
    """Return a table with one row a stream, and a total."""
    table = Table(title=f"KV cache in blocks of {BLOCK_SIZE} tokens", title_justify="left")
    table.add_column("stream")
    table.add_column("mode")
    for name in ("tokens", "folds", "KV blocks", "full attention", "saved", "tok/s"):
        table.add_column(name, justify="right")
    total_held = total_full = 0
    for stream in streams:
        now = stream.latest
        full = full_blocks(now.num_tokens)
        total_held, total_full = total_held + now.held_blocks, total_full + full
        table.add_row(
            stream.name + (" (done)" if stream.done else ""),
            stream.mode,
            str(now.num_tokens),
            str(now.folds) if stream.windowed else "-",
            str(now.held_blocks),
            str(full),
            f"{saved_percent(now.held_blocks, full):.0f} %",
            "-" if stream.done else f"{tokens_per_s(stream.samples):.1f}",
            style="green" if stream.windowed else "",
        )
    table.add_section()
    table.add_row(
        "total",
        "",
        str(sum(s.latest.num_tokens for s in streams)),
        str(sum(s.latest.folds for s in streams)),
        str(total_held),
        str(total_full),
        f"{saved_percent(total_held, total_full):.0f} %",
        f"{total_rate(streams):.1f}",
        style="bold",
    )
    if report:
        table.caption = f"pool: {report['free_blocks']} of {report['usable_blocks']} blocks free"
    return table


def total_rate(streams: Sequence[Stream]) -> float:
    return sum(tokens_per_s(s.samples) for s in streams if not s.done)


def plain_line(streams: Sequence[Stream], seconds: float) -> str:
    """Return the table in one line, for logs."""
    parts = [
        f"{s.name} {s.mode} {s.latest.num_tokens} tok {s.latest.held_blocks}"
        f"/{full_blocks(s.latest.num_tokens)} blocks"
        for s in streams
    ]
    return f"{seconds:5.0f} s  {total_rate(streams):5.1f} tok/s  " + " | ".join(parts)


def summary_table(streams: Sequence[Stream]) -> Table:
    table = Table(title="most KV blocks that a sequence ever held", title_justify="left")
    table.add_column("stream")
    table.add_column("mode")
    for name in ("tokens", "folds", "peak blocks", "full attention", "saved", "tok/s"):
        table.add_column(name, justify="right")
    for stream in streams:
        full = full_blocks(stream.latest.num_tokens)
        table.add_row(
            stream.name,
            stream.mode,
            str(stream.latest.num_tokens),
            str(stream.latest.folds) if stream.windowed else "-",
            str(stream.peak_blocks),
            str(full),
            f"{saved_percent(stream.peak_blocks, full):.0f} %",
            f"{stream.completion_tokens / stream.seconds:.1f}" if stream.seconds else "-",
            style="green" if stream.windowed else "",
        )
    return table


def save_plot(streams: Sequence[Stream], path: Path) -> None:
    """Draw KV blocks over tokens, each stream against full attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    longest = max((s.latest.num_tokens for s in streams), default=0)
    axes.plot(
        [0, longest],
        [0, longest / BLOCK_SIZE],
        color="0.4",
        linestyle="--",
        label="full attention, tokens / block size",
    )
    for stream in streams:
        axes.plot(
            [s.num_tokens for s in stream.samples],
            [s.held_blocks for s in stream.samples],
            linewidth=1.2,
            label=f"{stream.name}: {stream.mode}",
        )
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel(f"KV blocks held, {BLOCK_SIZE} tokens each")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class Steps:
    """Announces each step, and how long it took."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self.console = console
        self.num_steps = num_steps
        self.started = time.monotonic()
        self._step = 0

    @contextmanager
    def step(self, title: str, *, spinner: bool = True) -> Iterator[Callable[[str], None]]:
        """Yields a function that shows a line of progress beside the spinner, on a terminal."""
        self._step += 1
        label = f"[{self._step}/{self.num_steps}] {title}"
        self.console.print(Text(label, style="bold"))
        start = time.monotonic()
        if spinner and self.console.is_terminal:
            with self.console.status("") as status:
                room = max(20, self.console.width - 4)
                yield lambda line: status.update(
                    Text(f"{time.monotonic() - start:4.0f} s  {line}"[:room])
                )
        else:
            yield lambda line: None
        self.console.print(f"      {time.monotonic() - start:.1f} s")
