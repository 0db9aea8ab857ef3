"""Means, intervals and paired differences of a sweep."""

from __future__ import annotations

import statistics

import pytest

from pte_vllm.eval.arms import Arm
from pte_vllm.eval.pairs import equal_pairs, pairs_markdown
from pte_vllm.eval.results import (
    INTERRUPTED,
    Answer,
    Cell,
    Row,
    difference,
    full_of,
    mean_of,
    rows_of,
)


def _row(values: dict[str, list[float]], arm: Arm, *, tokens: int = 10, cut: bool = False) -> Row:
    return Row(
        benchmark="b",
        arm=arm,
        max_tokens=100,
        answers=tuple(
            Answer(
                problem=key,
                epoch=epoch,
                seed=0,
                value=value,
                cut=cut,
                prompt_tokens=5,
                answer_tokens=tokens,
            )
            for key, found in values.items()
            for epoch, value in enumerate(found)
        ),
    )


def test_problems_are_the_unit() -> None:
    row = _row({"p": [1, 0], "q": [1, 1], "r": [0, 0]}, Arm(window_tokens=0))
    mean = row.accuracy()
    assert mean.value == pytest.approx(0.5) and mean.count == 3
    assert mean.stderr == pytest.approx(statistics.stdev([0.5, 1, 0]) / 3**0.5)
    assert mean.low < mean.value < mean.high
    assert mean_of([1.0]).stderr == 0.0


def test_paired_intervals_are_narrower() -> None:
    hard, easy = {f"h{i}": [0.0] for i in range(10)}, {f"e{i}": [1.0] for i in range(10)}
    full = _row(hard | easy, Arm(window_tokens=0))
    window = _row(hard | easy | {"e0": [0.0]}, Arm(window_tokens=64))
    found = difference(window, full)
    assert found.value == pytest.approx(-0.05) and found.count == 20
    assert found.stderr < full.accuracy().stderr / 2
    assert full_of([window, full], window) is full and full_of([window], window) is None
    # What only one of them answered says nothing.
    assert difference(_row({"e0": [0.0]}, Arm(window_tokens=64)), full).count == 1


def test_arms_that_hold_as_much_are_compared() -> None:
    problems = {f"p{i}": [float(i < 6)] for i in range(10)}
    rows = [
        _row(problems, Arm(window_tokens=0)),
        _row(problems, Arm(window_tokens=64, keep_tokens=32)),
        _row(problems | {"p0": [0.0]}, Arm(window_tokens=96)),
        _row({}, Arm(window_tokens=96)),  # not begun
    ]
    tokens = (405.0, 230.0, 230.5, None)
    entries = [
        {"title": title, "kv_tokens": count, "state_tokens": 0.0}
        for title, count in zip(("full", "keep", "window", "failed"), tokens, strict=True)
    ]
    (pair,) = equal_pairs(rows, entries, block_tokens=32)
    assert (pair["arm"], pair["other"]) == ("keep", "window")
    assert pair["difference"]["value"] == pytest.approx(0.1)
    assert "| keep | window | +0.100 [" in pairs_markdown([pair])
    entries[1]["state_tokens"] = 32.0  # a state weighs, too
    assert not equal_pairs(rows, entries, block_tokens=32)


def test_solved_within() -> None:
    row = _row({"p": [1.0], "q": [0.0]}, Arm(window_tokens=0), tokens=30)
    assert [row.solved_within(n) for n in (0, 29, 30, 100)] == [0, 0, 0.5, 0.5]
    assert _row({"p": [1.0]}, Arm(window_tokens=0), cut=True).solved_within(100) == 0


def test_what_was_not_begun_is_a_row() -> None:
    cells = [
        Cell(benchmark="b", arm=Arm(window_tokens=window), max_tokens=9, seed=seed)
        for window in (64, 0)
        for seed in (0, 1)
    ]
    assert [Cell.from_dict(cell.to_dict()) for cell in cells] == cells
    rows = rows_of(cells, [])
    assert [row.key for row in rows] == ["w64", "full"]
    assert all(row.error == INTERRUPTED and not row.answers for row in rows)


def test_wilson() -> None:
    """Against the textbook's interval of 10 of 40, and where nothing was right."""
    mean = _row({f"p{i}": [float(i < 10)] for i in range(40)}, Arm(window_tokens=0)).accuracy()
    assert [mean.low, mean.high] == pytest.approx([0.1419, 0.4019], abs=1e-4)
    nothing = _row({f"p{i}": [0.0] for i in range(3)}, Arm(window_tokens=0)).accuracy()
    assert [nothing.low, nothing.high] == pytest.approx([0, 0.5615], abs=1e-4)
