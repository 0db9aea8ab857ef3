"""Holds conversations with a server under each memory, turn by turn, and keeps what was said.

Every conversation of every memory is one file, written anew after each turn: an interrupted run
goes on with the next one. The whole history goes along with each turn, as chat clients send it.
The model's own answers are part of it, where the conversation gives none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.eval.arms import Arm
from pte_vllm.eval.serving import ServerFacts
from pte_vllm.eval.talks import SYSTEM, Turn
from pte_vllm.wire.transport import Transport

TIMEOUT_S, RETRY_S = 1800.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One conversation under one memory."""

    arm: Arm
    seed: int
    talk: Sequence[Turn]
    file: Path
    settings: Mapping[str, Any]
    """What it depends on; a file with other settings is made anew."""

    def done(self) -> list[dict[str, Any]]:
        """Return the turns that earlier runs with these settings have held."""
        if not self.file.exists():
            return []
        record: dict[str, Any] = json.loads(self.file.read_text())
        turns: list[dict[str, Any]] = record["turns"]
        held = [(turn["question"], turn["answer"]) for turn in turns]
        drawn = [(t.text, t.reply or said) for t, (_, said) in zip(self.talk, held, strict=False)]
        # The conversation may be drawn otherwise than by the version that held it.
        return turns if record["settings"] == self.settings and held == drawn else []

    def record(self, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the file says of these turns."""
        return {
            "arm": self.arm.key,
            "title": self.arm.title,
            "seed": self.seed,
            "settings": dict(self.settings),
            "turns": list(turns),
        }

    def save(self, turns: Sequence[Mapping[str, Any]]) -> None:
        """Write the file, which appears whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.record(turns), indent=1) + "\n")
        part.replace(self.file)


def hold_all(
    jobs: Sequence[Job],
    facts: ServerFacts,
    *,
    api_key: str | None,
    max_tokens: int,
    concurrency: int,
    progress: Callable[[Job, int], None],
) -> list[dict[str, Any]]:
    """Hold the turns that no earlier run has held.

    Args:
        jobs: the conversations.
        facts: the server.
        api_key: of the server.
        max_tokens: most tokens of an answer.
        concurrency: conversations that are held at once.
        progress: is told of each turn that is over, with its number from 1.

    Returns:
        A record for each job, in order: `arm`, `title`, `seed`, `settings` and `turns`.

    Raises:
        ServerError: if the server refuses or stays away; what is finished stays.
    """
    records: dict[int, dict[str, Any]] = {}
    transport = Transport(facts.url, key=api_key, timeout_s=TIMEOUT_S, retry_s=RETRY_S)
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(concurrency) as pool:
            running = {
                pool.submit(_Talk(transport, facts, job, max_tokens, progress, stop).hold): i
                for i, job in enumerate(jobs)
            }
            try:
                for future in as_completed(running):
                    records[running[future]] = future.result()
            except BaseException:
                stop.set()  # the others end with the turn that they are at
                for future in running:
                    future.cancel()
                raise
    finally:
        transport.close()
    return [records[i] for i in range(len(jobs))]


class _Talk:
    """One conversation, and the server that answers it."""

    def __init__(
        self,
        transport: Transport,
        facts: ServerFacts,
        job: Job,
        max_tokens: int,
        progress: Callable[[Job, int], None],
        stop: threading.Event,
    ) -> None:
        self._transport, self._facts, self._job = transport, facts, job
        self._progress, self._stop = progress, stop
        plan = job.arm.plan(
            0, block_size=facts.block_size, evict_ratio=facts.evict_ratio, seed=job.seed
        )
        self._body = {
            "model": facts.models[0],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        if facts.pte:
            self._body["vllm_xargs"] = job.arm.request_args(plan)

    def hold(self) -> dict[str, Any]:
        """Go through the turns that are left; writes the job's file, and returns what is in it."""
        job = self._job
        messages = [{"role": "system", "content": SYSTEM}]
        turns = job.done()
        for held in turns:
            messages.append({"role": "user", "content": held["question"]})
            messages.append({"role": "assistant", "content": held["answer"]})
        for number, turn in enumerate(job.talk[len(turns) :], len(turns) + 1):
            if self._stop.is_set():
                raise InterruptedError("another conversation failed")
            messages.append({"role": "user", "content": turn.text})
            body = self._body | {"messages": messages}
            if turn.reply is not None:
                body["max_tokens"] = 1  # it is read all the same, and its blocks are counted
            reply = self._transport.json("POST", "/v1/chat/completions", json=body)
            text = turn.reply or reply["choices"][0]["message"]["content"] or ""
            messages.append({"role": "assistant", "content": text})
            turns.append(
                {
                    "question": turn.text,
                    "answer": text,
                    "wanted": turn.wanted,
                    "distance": turn.distance,
                    "right": turn.is_right(text),
                    "prompt_tokens": reply["usage"]["prompt_tokens"],
                    "blocks": self._blocks(reply["id"]),
                }
            )
            job.save(turns)
            self._progress(job, number)
        return job.record(turns)

    def _blocks(self, name: str) -> int | None:
        """Return the most KV blocks that a request held; None where the server does not say."""
        if not self._facts.pte:
            return None
        known = self._transport.json("GET", "/pte/v1/requests")
        records = [*known["running"], *known["finished"]]
        held = [record["peak_blocks"] for record in records if name in record["request_id"]]
        return max(held, default=None)
