"""Conversations: each turn sends the whole history, and pins the first and the newest question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, replayed

WINDOW = 4 * BLOCK
TURNS = 12
ANSWERS = (90, 20, 3, 150, 40)
"""Tokens of the answers, in turn: folds within a turn, between turns, and none for some."""
QUESTIONS = (45, 10, 70, 33)


class Conversation:
    """One conversation, turn by turn."""

    def __init__(
        self,
        seed: int,
        adapter: LoRARequest | None,
        *,
        answers: Sequence[int] = ANSWERS,
        **options: Any,
    ) -> None:
        self._answers = answers
        self._seed, self._adapter, self._options = seed, adapter, options
        self.history: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.jobs: list[Job] = []

    def next_turn(self) -> Job:
        turn = len(self.jobs)
        question = random_tokens(QUESTIONS[turn % 4], 500, 100 * self._seed + turn)
        prompt = self.history + question
        self.spans.append((len(self.history), len(prompt)))
        job = Job(
            prompt,
            self._answers[(turn + self._seed) % len(self._answers)],
            self._adapter,
            self._options
            | {"pte_pin_tokens": self.spans[0][1], "pte_pin_spans": tuple(self.spans[1:])},
            seed=turn,
        )
        self.jobs.append(job)
        return job

    def finish_turn(self) -> None:
        self.history = self.jobs[-1].prompt + self.jobs[-1].tokens

    def assert_parity(self, model: Path) -> float:
        """All turns at once: what the last one's plan says of earlier ones has not changed."""
        last = self.jobs[-1]
        plan = last.plan(WINDOW)
        assert plan.folds(len(self.history) - 1) >= 10
        expected = replayed(
            model,
            Path(self._adapter.lora_path) if self._adapter is not None else None,
            self.history,
            plan,
            rule=self._options.get("pte_update"),
            probes=last.probes,
            record=last.kept,
        )
        worst = 0.0
        for turn, job in enumerate(self.jobs):
            own = expected[len(job.prompt) - 1 :][: len(job.tokens)]
            found = float((torch.tensor(job.logprobs) - own.float()).abs().max())
            assert found <= TOLERANCE, f"turn {turn}: max |Δ log p| {found:.1e}"
            worst = max(worst, found)
        return worst


def conversations(model: Path, adapters: Callable[..., Path]) -> list[Conversation]:
    """Five that differ in rules and in what they keep."""
    ridge = lora("ridge", adapters(model, rank=8, rule="ridge", features="squared"), 1)
    paper = lora("paper", adapters(model, rank=8, rule="paper", layers=[0, 2]), 2)
    return [
        Conversation(0, ridge),
        Conversation(1, paper, pte_update="delta"),
        Conversation(2, paper, pte_keep=BLOCK),
        Conversation(3, None, pte_keep=3 * BLOCK),
        Conversation(4, ridge, pte_keep=2 * BLOCK, pte_keep_score="random", pte_evict_seed=5),
    ]


def talk(
    engine: Engine,
    of: list[Conversation],
    on_step: Callable[[int, list[str]], None] | None = None,
    turns: int = TURNS,
) -> None:
    """Let conversations go on, side by side, for all their turns."""
    for _ in range(turns):
        engine.run([conversation.next_turn() for conversation in of], on_step)
        for conversation in of:
            conversation.finish_turn()
