"""What `pte-vllm demo` shows: each answer while it comes, the table at the end, and the plot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pte_vllm.demo.answers import BLOCK_SIZE, Answer, Asked, peak_blocks, right

COLORS = ("#6b7280", "#d97706", "#2563eb")
"""Of the arms in the plot, in their order."""
WIDTHS = (1.2, 4.0, 1.2)
"""Of their lines: that of the second lies below that of the third, which holds as much."""


def mark(answer: Answer) -> Text:
    """Return what says whether an answer is right."""
    if not answer.done:
        return Text("...")
    return Text("right", style="green") if answer.right else Text("wrong", style="red")


def question_lines(one: Asked, number: int, count: int) -> Text:
    """Return the question, and where its answer was said."""
    question = one.question
    lines = Text(f"\nquestion {number} of {count}: {question.question}\n", style="bold")
    said = f'      {one.tokens_back} tokens back the text says "{question.facts[question.asked]}"'
    return lines.append(said, style="not bold")


def answers_table(one: Asked, width: int) -> Columns:
    """Return the answers side by side, as far as they have come, for a terminal of this width."""
    panels = []
    for answer in one.answers:
        held = answer.samples[-1].held_blocks if answer.samples else 0
        state = Text(f"{answer.peak_blocks if answer.done else held} KV blocks   ")
        text = Text(" ".join(answer.text.split()) + "\n").append(state).append(mark(answer))
        border = "dim" if not answer.done else "green" if answer.right else "red"
        panels.append(
            Panel(text, title=answer.arm.name, border_style=border, width=max(20, width // 3 - 1))
        )
    return Columns(panels, padding=(0, 1, 0, 0))


def answer_lines(one: Asked) -> Text:
    """Return the answers one below the other, for logs."""
    lines = Text()
    for answer in one.answers:
        lines.append("\n" if lines else "").append(f"      {answer.arm.name}: ")
        lines.append(mark(answer))
        lines.append(f", {answer.peak_blocks} KV blocks: {_short(answer)}")
    return lines


def _short(answer: Answer) -> str:
    return " ".join(answer.text.split())


def summary_table(asked: Sequence[Asked]) -> Table:
    """Return a row for each question, with the answers and the KV blocks of every arm."""
    title = f"answers, and KV blocks of {BLOCK_SIZE} tokens"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("question, and tokens back")
    for answer in asked[0].answers:
        table.add_column(answer.arm.name, ratio=1)
    for one in asked:
        cells = [Text(f"{one.question.question} {one.tokens_back} back: {one.question.answer}")]
        for answer in one.answers:
            cell = Text().append(mark(answer)).append(f", {answer.peak_blocks} blocks\n")
            cells.append(cell.append(_short(answer)))
        table.add_row(*cells)
    return table


def summary_line(asked: Sequence[Asked]) -> str:
    """Return how many answers of each arm are right, and the most blocks that it held."""
    return "; ".join(
        f"{answer.arm.name}: {right(asked, i)} of {len(asked)} right, "
        f"{peak_blocks(asked, i)} KV blocks"
        for i, answer in enumerate(asked[0].answers)
    )


def save_plot(asked: Sequence[Asked], path: Path) -> None:
    """Draw the blocks that each answer held over its tokens, and at the end whether it is right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (color, width) in enumerate(zip(COLORS, WIDTHS, strict=True)):
        name = asked[0].answers[i].arm.name
        label: str | None = f"{name}: {right(asked, i)} of {len(asked)} right"
        for one in asked:
            answer = one.answers[i]
            if not answer.samples:
                continue
            tokens = [sample.num_tokens for sample in answer.samples]
            blocks = [sample.held_blocks for sample in answer.samples]
            axes.plot(tokens, blocks, color=color, linewidth=width, alpha=0.8, label=label)
            label = None  # one for each arm
            axes.scatter(
                *(tokens[-1:], blocks[-1:], 45),
                marker="o" if answer.right else "X",
                facecolor="#16a34a" if answer.right else "#dc2626",
                edgecolor=color,
                zorder=3,
            )
    axes.set_xlabel("tokens of the sequence; a dot: the answer is right, a cross: it is wrong")
    axes.set_ylabel(f"KV blocks held, {BLOCK_SIZE} tokens each")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", loc="upper left")
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
