"""An engine that hangs, then dies: its metrics answer to the end, and the server ends with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest

from pte_vllm.server.scrape import MIN_INTERVAL_S, PATIENCE_S
from tests.harness.server import Server

SLACK_S = 10.0


def _engine(server: Server) -> psutil.Process:
    children = psutil.Process(server._process.pid).children(recursive=True)
    (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    return engine


@pytest.mark.ends_server
def test_scrape_of_an_engine_that_hangs_and_dies(shared: Callable[..., Server]) -> None:
    server = shared("admin")

    def scrape() -> tuple[float, str]:
        began = time.monotonic()
        answer = httpx.get(f"{server.url}/metrics", timeout=60)
        assert answer.status_code == 200
        return time.monotonic() - began, answer.text

    engine = _engine(server)
    assert "pte_folds_total" in scrape()[1]
    time.sleep(MIN_INTERVAL_S)
    engine.suspend()
    for _ in range(2):  # the second finds the first one's question unanswered
        seconds, text = scrape()
        assert seconds < PATIENCE_S + SLACK_S
        assert "pte_folds_total" in text and "pte_worker_age_seconds" in text
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scrape)
        time.sleep(PATIENCE_S / 4)
        os.kill(engine.pid, signal.SIGKILL)
        with suppress(httpx.TransportError):  # the server may be gone before it can answer
            assert "pte_folds_total" in waiting.result()[1]
    assert server._process.wait(timeout=60) == 1
