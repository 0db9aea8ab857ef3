"""Ledgers for the recall experiment: the right answer is given, and what it looks up is scored.

    [ question, pinned ] 1. Anna gives Ben 4 coins: Anna had 30 and now has 30 - 4 = 26. …
                                                             ^^ scored

A line begins from what was written last of two people, anywhere from one line to many lines back
(`train.data.ledger`). All of the answer is trained on, so that the adapter can also write it.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pte_vllm.train.data.ledger import SHOWN, Ledger
from pte_vllm.train.data.questions import chat_ids
from pte_vllm.train.experiments.recall_task import RecallSequence

_LOOK_UP = re.compile(r"\b(\w+) had (\d+) and")


@dataclass(frozen=True, kw_only=True)
class LedgerTask:
    """Makes sequences whose answers have about one length.

    Raises:
        ValueError: if an answer so short would have no line of its own.
    """

    tokenizer: Any
    num_tokens: int = 500
    """Tokens of the answer, at most; the question comes before them."""
    people: int = 3

    def sample(self, rng: random.Random) -> RecallSequence:
        """Make one sequence."""
        events = self.num_tokens // 16  # no line has fewer tokens
        ledger = Ledger.draw(rng, people=self.people, events=max(events, SHOWN + 1))
        lines = ledger.lines()
        sizes = accumulate(len(self._encode(f"{line}\n")["input_ids"]) for line in lines)
        lines = lines[: bisect_right(list(sizes), self.num_tokens)]
        if len(lines) <= SHOWN:
            raise ValueError(f"an answer of {self.num_tokens} tokens has no room for a ledger")
        ledger = Ledger(start=ledger.start, events=ledger.events[: len(lines)])
        prompt = chat_ids([{"role": "user", "content": ledger.question()}], self.tokenizer)
        text = "\n".join(lines)
        encoded = self._encode(text)
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = [end for _, end in encoded["offset_mapping"]]
        wanted = [False] * len(starts)
        spans, distances = [], []
        written = dict.fromkeys(ledger.start, 0)
        for match in _LOOK_UP.finditer(text):
            first, end = bisect_right(ends, match.start(2)), bisect_left(starts, match.end(2))
            number = [t for t in range(first, end) if text[starts[t] : ends[t]].strip()]
            for t in number:
                wanted[t] = True
            spans.append((len(prompt) + number[0], len(prompt) + end))
            distances.append(number[0] - written[match.group(1)])
            written[match.group(1)] = end
        return RecallSequence(
            token_ids=[*prompt, *encoded["input_ids"], self.tokenizer.eos_token_id],
            wanted=[False] * len(prompt) + wanted + [False],
            spans=spans,
            distances=distances,
            pin_tokens=len(prompt),
            trained=[False] * len(prompt) + [True] * (len(wanted) + 1),
        )

    def samples(self, count: int, rng: random.Random) -> list[RecallSequence]:
        """Make `count` sequences."""
        return [self.sample(rng) for _ in range(count)]

    def _encode(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
