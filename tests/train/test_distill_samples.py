"""Answers that are sampled before a distillation: a run that was killed asks for the rest only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill import samples
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.wire.rollout import Rollout, WeightSpan

QUESTIONS = 5


class _Stops:
    """A server's client that is cut off after some answers."""

    def __init__(self, answers: int) -> None:
        self.left = answers
        self.asked: list[str] = []

    def rollouts(
        self, prompts: Sequence[Sequence[int]], *, n: int, group_ids: Sequence[str], **_: Any
    ) -> Iterator[Rollout]:
        self.asked += group_ids
        # As a server: whoever finishes first comes first.
        for group, prompt in reversed(list(zip(group_ids, prompts, strict=True))):
            for index in range(n):
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                yield _rollout(list(prompt), group, index)


def _rollout(prompt: list[int], group: str, index: int) -> Rollout:
    return Rollout(
        prompt_ids=tuple(prompt),
        completion_ids=(int(group), index),
        logprobs=(-1.0, -1.0),
        mask=(1, 1),
        finish_reason="stop",
        adapter=None,
        rule=None,
        weight_versions=(WeightSpan(version=0, start=0, end=2),),
        plan=FoldPlan(pin_tokens=len(prompt), window_tokens=0, evict_ratio=0.25, block_size=16),
        group_id=group,
        index=index,
        num_preempted=0,
    )


def test_a_killed_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(f'{{"prompt": [{i}, 7, 8], "answer": "x"}}\n' for i in range(QUESTIONS))
    )
    run = DistillRun.model_validate(
        {
            "model": {"base": "none"},
            "distill": {"data": "samples", "max_sequences": 2 * QUESTIONS},
            "data": {"source": "jsonl", "path": str(questions)},
            "sampling": {"group_size": 2},
        }
    )
    out, console = tmp_path / "samples.jsonl", Console(stderr=True)

    def sample(client: _Stops) -> None:
        @contextmanager
        def connect(_: Any) -> Iterator[_Stops]:
            yield client

        monkeypatch.setattr(samples, "connect", connect)
        samples.sample_answers(run, None, out, console)

    first = _Stops(5)  # two questions, and one answer of a third
    with pytest.raises(KeyboardInterrupt):
        sample(first)
    assert not out.exists()
    (draft,) = tmp_path.glob(".samples.jsonl.*.part")
    draft.write_text(draft.read_text() + '{"prompt_ids": [1')  # a line that was cut off

    second = _Stops(100)
    sample(second)
    found = [Rollout.from_json(line) for line in out.read_text().splitlines()]
    assert [(r.group_id, r.index) for r in found] == [
        (str(i), index) for i in range(QUESTIONS) for index in range(2)
    ]
    assert first.asked == ["0", "1", "2", "3", "4"] and second.asked == ["0", "1", "2"]
    assert not list(tmp_path.glob(".samples*"))
    said = capsys.readouterr().err  # without a terminal there are lines
    assert "answers sampled: 5 of 10" in said and "answers sampled: 10 of 10" in said
