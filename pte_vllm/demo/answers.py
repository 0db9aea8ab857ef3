"""The arms of the demo, and what the server says about each answer."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pte_vllm.demo.notes import Question

BLOCK_SIZE = 32
"""`--block-size` of the demo's server."""


@dataclass(frozen=True)
class Sample:
    """It holds one poll of one answer."""

    num_tokens: int
    held_blocks: int


def find_record(report: dict[str, Any], response_id: str) -> dict[str, Any] | None:
    """Find the request behind a response id; the engine's id is that id and a random suffix."""
    for record in [*report["running"], *report["finished"]]:
        if record["request_id"].startswith(response_id):
            found: dict[str, Any] = record
            return found
    return None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to hold the past."""

    name: str
    options: dict[str, Any]
    """The request's `vllm_xargs`, without `pte_pin_tokens`."""


@dataclass(kw_only=True)
class Answer:
    """One question in one arm: what was said, and what it held."""

    arm: Arm
    question: Question
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str = ""
    peak_blocks: int = 0
    samples: list[Sample] = field(default_factory=list)
    done: bool = False

    @property
    def right(self) -> bool:
        """Whether the word that was asked for is in the answer."""
        return bool(re.search(rf"\b{re.escape(self.question.answer)}\b", self.text, re.IGNORECASE))

    def take_sample(self, report: dict[str, Any]) -> None:
        """Add what `GET /pte/v1/requests` says about this request, if it says anything."""
        record = find_record(report, f"chatcmpl-{self.request_id}")
        if record is None:
            return
        self.peak_blocks = max(self.peak_blocks, record["peak_blocks"])
        if record in report["running"]:  # a finished request holds nothing any more
            sample = Sample(record["num_tokens"], record["held_blocks"])
            if not self.samples or sample != self.samples[-1]:
                self.samples.append(sample)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question in all arms."""

    question: Question
    tokens_back: int
    """How many tokens before the question its answer was said."""
    answers: tuple[Answer, ...]


def arms(*, window: int, keep: int, keep_score: str) -> list[Arm]:
    """Return the arms. The window without memory holds as many blocks as the one with memory."""
    kept = {"pte_window": window, "pte_keep": keep, "pte_keep_score": keep_score}
    return [
        Arm(name="full attention", options={"pte_window": 0}),
        Arm(name=f"window {window + keep}", options={"pte_window": window + keep, "pte_keep": 0}),
        Arm(name=f"window {window} + {keep} kept", options=kept),
    ]


def right(asked: Sequence[Asked], arm: int) -> int:
    """Count the right answers of the arm with this index."""
    return sum(one.answers[arm].right for one in asked)


def peak_blocks(asked: Sequence[Asked], arm: int) -> int:
    """Return the most blocks that any answer of the arm with this index ever held."""
    return max((one.answers[arm].peak_blocks for one in asked), default=0)
