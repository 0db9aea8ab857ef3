"""A worker is killed during a rollout, as when memory runs out: all end, and the status tells."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from pte_vllm.wire.client import RolloutClient, ServerError
from tests.harness.kinds import ADMIN_KEY
from tests.harness.server import Server


@pytest.mark.ends_server
def test_killed_worker_ends_the_server(shared: Callable[..., Server]) -> None:
    server = shared("keys")
    processes = server.processes()
    (worker,) = [p for p in processes if "Worker" in " ".join(p.cmdline())]
    sampling = {"max_tokens": 4000, "ignore_eos": True}
    with (
        ThreadPoolExecutor(1) as pool,
        RolloutClient(server.url, api_key=ADMIN_KEY, retry_s=1.0) as client,
    ):
        asked = pool.submit(lambda: list(client.rollouts([[5, 6]], n=4, sampling=sampling)))
        server.wait_running(4)
        worker.kill()
        with pytest.raises(ServerError):
            asked.result(120)
    assert server._process is not None
    assert server._process.wait(120) == 1, server.log.read_text()[-3000:]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
