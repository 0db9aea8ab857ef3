"""Numbers of a sweep, read from inspect-ai's logs: one row for each benchmark, arm and length.

An answer counts as its judge says; a problem as the mean of its answers; an arm as the mean of its
problems. Problems are the unit of every interval, so that several answers to one problem do not
pass for several problems.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from pte_vllm.eval.arms import FULL, Arm, Pins, peak_tokens

INTERRUPTED = "interrupted"
"""The reason of a row whose task was not begun, or not asked to the end."""
Z = 1.96
"""Standard errors to each side of a mean: 95 % of a normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to one problem."""

    problem: str
    epoch: int
    seed: int
    value: float
    """What the judge gave, from 0 to 1."""
    cut: bool
    """Whether it reached the limit of its length."""
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over problems, and its standard error."""

    value: float
    stderr: float
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval of 95 %."""
        return self.value - Z * self.stderr

    @property
    def high(self) -> float:
        """Upper end of the interval of 95 %."""
        return self.value + Z * self.stderr

    def to_dict(self) -> dict[str, float]:
        """Return the numbers, the interval among them."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "low": self.low,
            "high": self.high,
            "count": self.count,
        }


@dataclass(frozen=True, kw_only=True)
class Share(Mean):
    """A mean of numbers in [0, 1], with an interval that stays in there (Wilson's score)."""

    @property
    def low(self) -> float:
        """Lower end of the interval of 95 %."""
        return self._center() - self._half()

    @property
    def high(self) -> float:
        """Upper end of the interval of 95 %."""
        return self._center() + self._half()

    def _center(self) -> float:
        return (self.value + Z**2 / (2 * self.count)) / (1 + Z**2 / self.count)

    def _half(self) -> float:
        spread = self.value * (1 - self.value) / self.count + (Z / (2 * self.count)) ** 2
        return Z * math.sqrt(spread) / (1 + Z**2 / self.count)


def mean_of(values: Sequence[float]) -> Mean:
    """Return mean and standard error, s / √n with n - 1 degrees of freedom, as inspect-ai does."""
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    if count < 2:
        return Mean(value=mean, stderr=0.0, count=count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(value=mean, stderr=math.sqrt(variance / count), count=count)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one benchmark at one length: all its seeds together."""

    benchmark: str
    arm: Arm | None
    """None: a server without PTE."""
    max_tokens: int
    answers: tuple[Answer, ...] = ()
    pass_at: Mapping[int, float] = field(default_factory=dict)
    """By k: the mean of inspect-ai's estimates of pass@k over seeds."""
    error: str | None = None
    """Why it is not complete; None where it is."""
    seconds: float = 0.0
    """How long its answers took from the first to the last, with what ran beside."""

    @property
    def key(self) -> str:
        """The arm's key."""
        return "plain" if self.arm is None else self.arm.key

    @property
    def title(self) -> str:
        """What a table calls the arm."""
        return "plain server" if self.arm is None else self.arm.title

    def by_problem(self) -> dict[str, float]:
        """Return the mean of its answers by problem."""
        found: dict[str, list[float]] = defaultdict(list)
        for answer in self.answers:
            found[answer.problem].append(answer.value)
        return {key: math.fsum(values) / len(values) for key, values in found.items()}

    def accuracy(self) -> Share:
        """Return accuracy (avg@k with k answers to a problem)."""
        mean = mean_of(list(self.by_problem().values()))
        return Share(value=mean.value, stderr=mean.stderr, count=mean.count)

    def answer_tokens(self) -> float:
        """Return the mean length of an answer."""
        return mean_of([a.answer_tokens for a in self.answers]).value

    def cut(self) -> float:
        """Return the share of answers that reached the limit of their length."""
        return mean_of([float(a.cut) for a in self.answers]).value

    def peak_tokens(
        self, *, block_size: int, evict_ratio: float, pins: Mapping[str, Pins] | None = None
    ) -> float:
        """Return the mean of the most KV room an answer takes, in tokens, without states.

        `pins` has what is pinned of problems, by their keys; of others the whole prompt is.
        """
        arm, known = self.arm or Arm(window_tokens=0), pins or {}
        sizes: dict[str, Any] = {"block_size": block_size, "evict_ratio": evict_ratio}
        peaks = []
        for answer in self.answers:
            plan = arm.plan(answer.prompt_tokens, pins=known.get(answer.problem), **sizes)
            peaks.append(peak_tokens(plan, answer.prompt_tokens + answer.answer_tokens))
        return mean_of(peaks).value

    def solved_within(self, num_tokens: int) -> float:
        """Return the share solved by answers that ended within so many tokens, by problem."""
        found: dict[str, list[float]] = defaultdict(list)
        for a in self.answers:
            ended = not a.cut and a.answer_tokens <= num_tokens
            found[a.problem].append(a.value if ended else 0.0)
        return mean_of([math.fsum(v) / len(v) for v in found.values()]).value


def difference(row: Row, other: Row) -> Mean:
    """Return accuracy of `row` less that of `other`, paired by problem.

    Problems that only one of them has are left out. Where problems differ more than arms do, which
    is the rule, the interval is much narrower than those of the two accuracies.
    """
    ours, theirs = row.by_problem(), other.by_problem()
    return mean_of([ours[key] - theirs[key] for key in ours if key in theirs])


def full_of(rows: Iterable[Row], row: Row) -> Row | None:
    """Return the full cache's row that a row is compared with; None if it is that, or lacks it."""
    for other in rows:
        if (
            other is not row
            and other.key == FULL
            and other.benchmark == row.benchmark
            and other.max_tokens == row.max_tokens
            and other.answers
        ):
            return other
    return None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one task of a sweep asks: all problems of a benchmark, under one arm with one seed."""

    benchmark: str
    arm: Arm | None
    """None: a server without PTE."""
    max_tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, for the log of the task."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """Read what `to_dict` wrote."""
        arm = values["arm"]
        return cls(**{**values, "arm": None if arm is None else Arm(**arm)})


def rows_of(cells: Iterable[Cell], logs: Iterable[Any]) -> list[Row]:
    """Return the rows of a sweep, in the order of its cells; seeds of one arm make one row.

    A task that did not finish, or was not begun, leaves its reason in the row.

    Args:
        cells: what the sweep asks.
        logs: `inspect_ai.log.EvalLog`, the newest of each task, with summaries of its samples.
    """
    found = {Cell.from_dict(log.eval.metadata): log for log in logs}
    parts: dict[tuple[str, Arm | None, int], list[Row]] = {}
    for cell in cells:
        row = _row_of(cell, found.get(cell))
        parts.setdefault((cell.benchmark, cell.arm, cell.max_tokens), []).append(row)
    return [_joined(rows) for rows in parts.values()]


def _row_of(cell: Cell, log: Any) -> Row:
    row = Row(benchmark=cell.benchmark, arm=cell.arm, max_tokens=cell.max_tokens)
    if log is None:
        return replace(row, error=INTERRUPTED)
    error = None
    if log.status != "success":
        error = INTERRUPTED if log.error is None else reason_of(log.error.message)
    pass_at: dict[int, float] = {}
    for scores in log.results.scores if log.results is not None else ():
        if scores.reducer and scores.reducer.startswith("pass_at_"):
            k = int(scores.reducer.rpartition("_")[2])
            pass_at[k] = float(scores.metrics["accuracy"].value)
    return replace(
        row,
        answers=tuple(_answers(log.samples or (), cell.seed)),
        pass_at=pass_at,
        error=error,
        seconds=_seconds(log.samples or ()),
    )


def reason_of(message: str) -> str:
    """Return why a request failed in one line, without the request that inspect-ai quotes."""
    found = re.findall(r"Error code: \d+ - (.+)", message)
    text = found[-1].rstrip("')\"\\") if found else message.rpartition("\n\n")[2]
    return " ".join(text.split())


def _answers(samples: Iterable[Any], seed: int) -> Iterable[Answer]:
    for sample in samples:
        if not sample.scores:
            continue  # it failed; the log says why
        (score,) = sample.scores.values()
        notes = score.metadata or {}
        yield Answer(
            problem=str(sample.id),
            epoch=sample.epoch,
            seed=seed,
            value=float(score.value),
            cut=bool(notes["cut"]),
            prompt_tokens=int(notes["prompt_tokens"]),
            answer_tokens=int(notes["answer_tokens"]),
        )


def _seconds(samples: Iterable[Any]) -> float:
    times = [(s.started_at, s.completed_at) for s in samples if s.started_at and s.completed_at]
    if not times:
        return 0.0
    first = min(datetime.fromisoformat(str(start)) for start, _ in times)
    last = max(datetime.fromisoformat(str(end)) for _, end in times)
    return (last - first).total_seconds()


def _joined(parts: Sequence[Row]) -> Row:
    """Join the seeds of one arm."""
    errors = sorted({part.error for part in parts if part.error})
    ks = {k for part in parts for k in part.pass_at}
    return replace(
        parts[0],
        answers=tuple(answer for part in parts for answer in part.answers),
        pass_at={k: mean_of([p.pass_at[k] for p in parts if k in p.pass_at]).value for k in ks},
        error="; ".join(errors) or None,
        seconds=sum(part.seconds for part in parts),
    )
