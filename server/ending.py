"""A stop answers the requests that still run, so that clients get something and the server ends."""

from __future__ import annotations

import asyncio
import functools
import threading
from dataclasses import dataclass
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.v1.utils import APIServerProcessManager

GRACE_S = 10.0
"""How long the first process waits for each of several API servers to answer what runs."""

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes


@dataclass
class Ending:
    """Tells why a server ended."""

    was_stopped: bool = False
    """Whether a signal asked for it; else the engine has died."""

    @property
    def exit_status(self) -> int:
        """What the process ends with."""
        return 0 if self.was_stopped else 1


def wait_for_api_servers() -> None:
    """Have vLLM wait when it stops several API servers: each has to answer what runs by way of it.

    vLLM 0.32 kills them after `--shutdown-timeout`, which is 0 unless it is given, and so while
    they write. Call it once, in the process that starts them.
    """
    stop = APIServerProcessManager.shutdown

    @functools.wraps(stop)
    def shutdown(self: APIServerProcessManager, timeout: float | None = None) -> None:
        stop(self, None if timeout is None else timeout + GRACE_S)

    setattr(APIServerProcessManager, "shutdown", shutdown)  # noqa: B010


def answer_at_shutdown(engine: EngineClient, ending: Ending) -> None:
    """Make `engine.shutdown` answer unfinished requests with `abort` and what was sampled.

    vLLM 0.32 stops its engine (at once, or after `--shutdown-timeout`) and then waits for open
    connections, whose requests hear no more of it: the server would have to be killed.

    Call it in the event loop. After a signal vLLM calls `shutdown` from another thread, and in the
    event loop at the end of every server.
    """
    # TODO(vllm>=0.33): drop, once vLLM's API server ends its own requests.
    loop, stop = asyncio.get_running_loop(), engine.shutdown
    processor: Any = engine.output_processor  # AsyncLLM has it

    def end() -> None:
        if left := list(processor.request_states):
            logger.info("%d requests end with what they have", len(left))
            processor.abort_requests(left, internal=True)

    @functools.wraps(stop)
    def shutdown(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            ending.was_stopped = True
        stop(*args, **kwargs)
        if not loop.is_closed():
            loop.call_soon_threadsafe(end)

    engine.shutdown = shutdown
