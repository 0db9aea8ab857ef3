"""A stop answers the requests that still run, so that clients get something and the server ends."""

from __future__ import annotations

import asyncio
import functools
import threading
from dataclasses import dataclass
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

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
