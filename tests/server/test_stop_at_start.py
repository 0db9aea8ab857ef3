"""A stop while the server starts ends all of its processes, whatever they are waiting for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pte_vllm.engine.orphans import GRACE_S, POLL_S
from tests.harness.server import Server

PATIENCE_S = 10.0
"""Until all must have ended. A machine that is busy takes longer for everything, so what counts is
the time that the processes themselves compute; on the clock they have more."""
BUSY = 6


class Starting(Server):
    """A server that is still starting, and all processes that were ever seen of it."""

    def __init__(self, model: Path, directory: Path) -> None:
        flags = ["--pte-spool", str(directory / "spool")]
        super().__init__(model, {}, log=directory / "log", flags=flags)
        self.seen: dict[int, psutil.Process] = {}

    def processes(self) -> list[psutil.Process]:
        """Return the API server, the engine core and the worker, as far as they are there."""
        try:
            found = super().processes()
            named = [p for p in found if "resource_tracker" not in " ".join(p.cmdline())]
        except psutil.NoSuchProcess:
            return self.processes() if self.is_running() else []
        self.seen.update({process.pid: process for process in found})
        return [p for p in named if p is found[0] or p.status() != psutil.STATUS_ZOMBIE]

    def wait_for(self, reached: Callable[[list[psutil.Process]], bool]) -> None:
        self.wait_until(lambda: reached(self.processes()), timeout_s=300, poll_s=0.05)

    def wait_gone(self, patience_s: float) -> None:
        began = time.monotonic()
        self._process.wait(patience_s * BUSY)
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=patience_s * BUSY)
        print(f"all ended after {time.monotonic() - began:.1f} s")
        assert not alive, alive


@pytest.fixture
def server(tiny: Callable[[str], Path], tmp_path: Path) -> Iterator[Starting]:
    with Starting(tiny("qwen3"), tmp_path) as server:
        yield server


def _engine_is_there(processes: list[psutil.Process]) -> bool:
    return len(processes) > 1


def _worker_is_there(processes: list[psutil.Process]) -> bool:
    return len(processes) > 2


def _worker_loads(processes: list[psutil.Process]) -> bool:
    # Past its imports: a worker that has begun runs threads of torch's.
    return len(processes) > 2 and processes[-1].memory_info().rss > 300 << 20


@pytest.mark.parametrize(
    ("reached", "number", "everyone"),
    [
        (_engine_is_there, signal.SIGTERM, True),
        (_worker_loads, signal.SIGTERM, False),
        pytest.param(_engine_is_there, signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(_engine_is_there, signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(_worker_is_there, signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(_worker_loads, signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(_worker_loads, signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_stopped_while_it_starts(
    server: Starting, reached: Callable[..., bool], number: int, everyone: bool
) -> None:
    server.wait_for(reached)
    (os.killpg if everyone else os.kill)(server.pid, number)
    server.wait_gone(PATIENCE_S)
    assert server.exit_status() == 128 + number, server.log.read_text()[-3000:]
    assert "while the server started" in server.log.read_text()


def test_stopped_while_it_imports(server: Starting) -> None:
    """There is nothing to end yet but the process itself."""
    server.wait_for(lambda processes: processes[0].cpu_times().user > 1.0)
    os.kill(server.pid, signal.SIGTERM)
    server.wait_gone(PATIENCE_S)
    assert server.exit_status() in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 2], ids=["server", "engine", "worker"])
def test_killed_while_it_starts(server: Starting, index: int) -> None:
    """Whoever is killed, the others end too; nobody who is left would answer."""
    server.wait_for(_worker_loads)
    server.processes()[index].kill()
    server.wait_gone(POLL_S + GRACE_S + PATIENCE_S)
    assert server.exit_status() not in (0, None)
