"""A request that failed in the engine says why, in an answer of its own.

The engine ends it with the finish reason `error`, and the reason of ours beside it. vLLM answers
"Internal server error" to that; here it becomes 422 with the reason, on every route and in streams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError, VLLMUnprocessableEntityError
from vllm.outputs import RequestOutput


class RequestFailed(VLLMUnprocessableEntityError, GenerationError):
    """A request that the engine could not finish, for a reason that is the request's own."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.status_code = HTTPStatus.UNPROCESSABLE_ENTITY


def say_why(engine: EngineClient) -> None:
    """Have the engine raise `RequestFailed` for a request that failed, whatever route it is of."""
    generate: Any = engine.generate

    async def saying_why(*args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        # Closed with this one: vLLM's aborts the request when its client leaves.
        async with aclosing(generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                for choice in output.outputs:
                    if choice.finish_reason == "error" and isinstance(choice.stop_reason, str):
                        raise RequestFailed(choice.stop_reason)
                yield output

    engine.generate = saying_why  # type: ignore[method-assign]
