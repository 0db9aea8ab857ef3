"""Ctrl-C during a rollout: the whole process group hears it, clients are answered, all end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.harness.server import Server


@pytest.mark.ends_server
def test_interrupt_answers_what_runs(shared: Callable[..., Server]) -> None:
    server = shared("loaded")
    processes = server.processes()
    sampling = {"max_tokens": 4000, "ignore_eos": True}
    body = {"token_ids": [[5, 6, 7]], "n": 3, "sampling": sampling}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{server.url}/pte/v1/rollouts", json=body, timeout=300)
        server.wait_running(3)
        server.pace(20)
        os.killpg(server.pid, signal.SIGINT)
        assert server._process is not None
        assert server._process.wait(120) == 0, server.log.read_text()[-3000:]
        records = [json.loads(line) for line in asked.result(120).text.splitlines() if line]
    assert [r["finish_reason"] for r in records] == ["abort"] * 3
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
