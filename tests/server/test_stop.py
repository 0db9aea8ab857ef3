"""A busy server gets SIGTERM, as `docker stop` sends it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.harness.server import Server


@pytest.mark.ends_server
def test_sigterm_answers_what_runs(shared: Callable[..., Server]) -> None:
    server = shared("open")
    body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True}
    rollouts = {"token_ids": [[5, 6, 7]], "n": 2, "sampling": {"max_tokens": 4000}}
    rollouts["sampling"]["ignore_eos"] = True
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(httpx.post, f"{server.url}{path}", json=sent, timeout=300)
            for path, sent in (
                ("/v1/completions", body),
                ("/v1/completions", {**body, "stream": True}),
                ("/pte/v1/rollouts", rollouts),
            )
        ]
        server.wait_running(4)
        server.pace(20)
        assert server._process is not None
        os.kill(server._process.pid, signal.SIGTERM)
        assert server._process.wait(120) == 0, server.log.read_text()[-3000:]
        whole, streamed, sampled = (future.result(120) for future in asked)
    assert whole.json()["choices"][0]["finish_reason"] == "abort"
    assert 0 < whole.json()["usage"]["completion_tokens"] < 4000
    assert '"finish_reason":"abort"' in streamed.text and "[DONE]" in streamed.text
    records = [json.loads(line) for line in sampled.text.splitlines() if line]
    assert [r["finish_reason"] for r in records] == ["abort"] * 2
    assert all(0 < len(r["completion_ids"]) < 4000 for r in records)
