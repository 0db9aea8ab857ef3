"""Sleep where vLLM polls: between engine and worker on a CPU.

`SpinCondition.wait` gives the processor up and returns at once for a second after each message, so
that its caller polls. Two processes of a server poll then, on cores that the model needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from pte_vllm.engine.waiting import RECHECK_MS, sleeps_while_waiting
from pte_vllm.patches.base import Patch


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        polls = time.monotonic() <= self.last_read + self.busy_loop_s
        if not (polls and sleeps_while_waiting()):
            original(self, timeout_ms)
            return
        busy_loop_s, self.busy_loop_s = self.busy_loop_s, -1.0  # vLLM's own way to sleep
        try:
            original(self, RECHECK_MS if timeout_ms is None else min(timeout_ms, RECHECK_MS))
        finally:
            self.busy_loop_s = busy_loop_s

    return wait


PATCH = Patch(
    name="p02_waits_on_cpu",
    target="vllm.distributed.device_communicators.shm_broadcast.SpinCondition.wait",
    upstream="vllm/distributed/device_communicators/shm_broadcast.py at v0.32.0",
    why="engine and worker poll for a second after each message, on cores that a CPU model needs",
    remove_when="vLLM has an option for how long it polls",
    sha256="e26845dbad99f8e86df77b26c9680c48ae92d95731ded6fffdf7f71b86f754fc",
    wrap=_wrap,
)
