"""An engine whose API server is gone ends too.

vLLM's workers end with their engine core, but its engine core does not hear of the end of the API
server that started it: killed alone, as by the kernel when memory runs out, the server would leave
behind a model and a KV cache that nobody can reach, and no room for the next one.
TODO(vllm>=0.33): drop if `EngineCoreProc` watches its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

POLL_S = 2.0
GRACE_S = 10.0
"""Between SIGTERM, at which the core stops its workers, and SIGKILL."""
_PROCESS_NAME = "EngineCore"
"""How vLLM names the process, as a prefix."""


def end_with_parent() -> None:
    """Watch this process's parent from a thread; does nothing unless this is an engine core's own.

    An engine that runs inside somebody's process is theirs to end.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(_PROCESS_NAME):
        return
    watcher = threading.Thread(
        target=_watch, args=(parent.sentinel, os.getppid()), name="pte-orphans", daemon=True
    )
    watcher.start()


def _watch(sentinel: int, parent_pid: int) -> None:
    # The sentinel stays silent while another child of the parent holds its other end.
    while not wait([sentinel], POLL_S) and os.getppid() == parent_pid:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
