"""Holds conversations with a server under each memory, turn by turn, and keeps what was said.

Every conversation of every memory is one file, written when it is over. The whole history goes
along with each turn, as chat clients send it, and the model's own answers are part of it.
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

    def found(self) -> dict[str, Any] | None:
        """Return the record of an earlier run; None where there is none of these settings."""
        if not self.file.exists():
            return None
        record: dict[str, Any] = json.loads(self.file.read_text())
        return record if record["settings"] == self.settings else None


def hold_all(
    jobs: Sequence[Job],
    facts: ServerFacts,
    *,
    api_key: str | None,
    max_tokens: int,
    concurrency: int,
    progress: Callable[[Job, int], None],
) -> list[dict[str, Any]]:
    """Hold the conversations that no earlier run has held.

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
            running = {}
            for i, job in enumerate(jobs):
                if (record := job.found()) is not None:
                    records[i] = record
                else:
                    talk = _Talk(transport, facts, job, max_tokens, progress, stop)
                    running[pool.submit(talk.hold)] = i
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
        """Go through all turns; writes the job's file, and returns what is in it."""
        job = self._job
        messages = [{"role": "system", "content": SYSTEM}]
        turns = []
        for number, turn in enumerate(job.talk, 1):
            if self._stop.is_set():
                raise InterruptedError("another conversation failed")
            messages.append({"role": "user", "content": turn.text})
            body = self._body | {"messages": messages}
            reply = self._transport.json("POST", "/v1/chat/completions", json=body)
            text = reply["choices"][0]["message"]["content"] or ""
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
            self._progress(job, number)
        record = {
            "arm": job.arm.key,
            "title": job.arm.title,
            "seed": job.seed,
            "settings": dict(job.settings),
            "turns": turns,
        }
        job.file.parent.mkdir(parents=True, exist_ok=True)
        part = job.file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(job.file)
        return record

    def _blocks(self, name: str) -> int | None:
        """Return the most KV blocks that a request held; None where the server does not say."""
        if not self._facts.pte:
            return None
        known = self._transport.json("GET", "/pte/v1/requests")
        records = [*known["running"], *known["finished"]]
        held = [record["peak_blocks"] for record in records if name in record["request_id"]]
        return max(held, default=None)
