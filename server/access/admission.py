"""Back-pressure: how many samples of rollouts and scores may wait or run at once."""

from __future__ import annotations

from http import HTTPStatus

from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve import create_error_response

RETRY_AFTER_S = 5
"""How long a client that is turned away is told to wait."""


class BusyError(RuntimeError):
    """There is no room for more samples; the client gets HTTP 429."""


class Admission:
    """Counts samples in flight.

    Args:
        limit: how many may be in flight. A request that would exceed it is turned away; one that
            comes alone is not.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_flight = 0

    def enter(self, count: int) -> None:
        """Count `count` samples in.

        Raises:
            BusyError: if there is no room for them.
        """
        if self.in_flight and self.in_flight + count > self._limit:
            raise BusyError(
                f"{self.in_flight} samples are in flight, and {count} more would exceed this "
                f"server's --pte-max-rollouts {self._limit}; try again later"
            )
        self.in_flight += count

    def leave(self) -> None:
        """Count one sample out, however it ended."""
        self.in_flight -= 1


def too_many(message: str) -> Response:
    """Answer 429, with the header that vLLM's handler of HTTPException would drop."""
    body = create_error_response(message, "TooManyRequests", HTTPStatus.TOO_MANY_REQUESTS)
    after = {"Retry-After": str(RETRY_AFTER_S)}
    return JSONResponse(body.model_dump(), HTTPStatus.TOO_MANY_REQUESTS, headers=after)
