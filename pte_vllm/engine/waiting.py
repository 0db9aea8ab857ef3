"""On a CPU, engine and worker wait for each other without keeping a core busy.

vLLM polls their shared queue without a pause, for a second after each message. Beside a GPU that
costs a core that has nothing else to do. On a CPU it takes the core from the model.
"""

from __future__ import annotations

from vllm.platforms import current_platform

RECHECK_MS = 1
"""How long a wait may sleep before it looks again; a message wakes it at once, unless it is lost:
the queue keeps one notification at most and drops the others."""


class _Switch:
    on = False


def sleep_while_waiting() -> None:
    """Make this process sleep while it waits, if vLLM runs on a CPU; lasts until it ends."""
    _Switch.on = _Switch.on or current_platform.is_cpu()


def sleeps_while_waiting() -> bool:
    """Return whether this process was told to sleep while it waits (`patches/p02_...`)."""
    return _Switch.on
