"""What a server started ends with it: its engines, their workers, its API servers.

vLLM's engine core does not hear of the end of the API server that started it: killed alone, as by
the kernel when memory runs out, the server would leave behind a model and a KV cache that nobody
can reach, and no room for the next one. Its workers end with their engine core only once they have
loaded their model.
TODO(vllm>=0.33): drop if `EngineCoreProc` and `WorkerProc` watch their parents from the start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

POLL_S = 2.0
GRACE_S = 10.0
"""Between SIGTERM, at which the core stops its workers, and SIGKILL."""
_PROCESS_NAMES = ("EngineCore", "VllmWorker", "ApiServer", "VLLM_DP_Coordinator")
"""How vLLM names the processes, as prefixes."""
_THREAD_NAME = "pte-orphans"
_coordinate: Callable[..., None] | None = None
"""vLLM's own function, once it was replaced."""
ENABLED = "PTE_END_WITH_PARENT"
"""A variable that `pte_vllm.serve.engine_args` sets for the processes that it starts."""


def end_with_parent() -> None:
    """Watch this process's parent from a thread, unless a thread does so already.

    Does nothing unless this is a process that vLLM started for an engine core, a worker, one of
    several API servers or the coordinator of engines: an engine that runs inside somebody's process
    is theirs to end.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(_PROCESS_NAMES):
        return
    if any(thread.name == _THREAD_NAME for thread in threading.enumerate()):
        return
    watcher = threading.Thread(
        target=_watch, args=(parent.sentinel, os.getppid()), name=_THREAD_NAME, daemon=True
    )
    watcher.start()


def watch_coordinator() -> None:
    """Have the coordinator of engines, if this process starts one, watch this process too.

    It loads no plugin, so vLLM is given another function to run in it.
    """
    global _coordinate
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    if _coordinate is None:
        _coordinate = DPCoordinatorProc.run_coordinator
        setattr(DPCoordinatorProc, "run_coordinator", staticmethod(run_coordinator))  # noqa: B010


def run_coordinator(**options: Any) -> None:
    """Do as vLLM's function, in the process that it starts, but end with the parent."""
    end_with_parent()
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    # A process that was forked has ours in both places but this one.
    (_coordinate or DPCoordinatorProc.run_coordinator)(**options)


def _watch(sentinel: int, parent_pid: int) -> None:
    # The sentinel stays silent while another child of the parent holds its other end.
    while not wait([sentinel], POLL_S) and os.getppid() == parent_pid:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
