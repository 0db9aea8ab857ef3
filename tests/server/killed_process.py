"""What has to happen when a process of a server is killed, as when memory runs out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from pte_vllm.wire.client import RolloutClient, ServerError
from tests.harness.server import Server


def assert_killed_process_ends(
    server: Server, title: str = "Worker", key: str | None = None
) -> None:
    """Kill the last process of that title while four samples run.

    Clients hear of it, and no process is left.
    """
    processes = server.processes()
    victims = [p for p in processes if title in " ".join(p.cmdline())]
    sampling = {"max_tokens": 4000, "ignore_eos": True}
    with (
        ThreadPoolExecutor(1) as pool,
        RolloutClient(server.url, api_key=key, retry_s=1.0) as client,
    ):
        asked = pool.submit(lambda: list(client.rollouts([[5, 6]], n=4, sampling=sampling)))
        server.wait_running(4)
        victims[-1].kill()
        with pytest.raises((ServerError, httpx.TransportError)):  # the latter from who was killed
            asked.result(120)
    assert server._process is not None
    assert server._process.wait(120) == 1, server.log.read_text()[-3000:]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
