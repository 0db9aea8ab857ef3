"""What has to happen when a worker is killed, as when memory runs out, of one engine or of many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from pte_vllm.wire.client import RolloutClient, ServerError
from tests.harness.server import Server


def assert_killed_worker_ends(server: Server, key: str | None = None) -> None:
    """Kill the last worker while four samples run: clients hear of it, and no process is left."""
    processes = server.processes()
    workers = [p for p in processes if "Worker" in " ".join(p.cmdline())]
    sampling = {"max_tokens": 4000, "ignore_eos": True}
    with (
        ThreadPoolExecutor(1) as pool,
        RolloutClient(server.url, api_key=key, retry_s=1.0) as client,
    ):
        asked = pool.submit(lambda: list(client.rollouts([[5, 6]], n=4, sampling=sampling)))
        server.wait_running(4)
        workers[-1].kill()
        with pytest.raises(ServerError):
            asked.result(120)
    assert server._process is not None
    assert server._process.wait(120) == 1, server.log.read_text()[-3000:]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
