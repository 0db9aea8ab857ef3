"""Back-pressure: how many samples of rollouts and scores may wait or run at once."""

from __future__ import annotations

from http import HTTPStatus

from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve import create_error_response

from pte_vllm.server.sharing.counts import Counts

RETRY_AFTER_S = 5
"""How long a client that is turned away is told to wait."""
_KEY = "samples"


class BusyError(RuntimeError):
    """There is no room for more samples; the client gets HTTP 429."""


class Admission:
    """Counts samples in flight.

    Args:
        limit: how many may be in flight. A request that would exceed it is turned away; one that
            comes alone is not. Where several API servers count together, requests that reach them
            at the same moment may exceed it.
        counts: what counts.
    """

    def __init__(self, limit: int, counts: Counts) -> None:
        self._limit = limit
        self._counts = counts

    @property
    def in_flight(self) -> int:
        """How many samples wait or run."""
        return self._counts.get(_KEY)

    def enter(self, count: int) -> None:
        """Count `count` samples in.

        Raises:
            BusyError: if there is no room for them.
        """
        in_flight = self.in_flight
        if in_flight and in_flight + count > self._limit:
            raise BusyError(
                f"{in_flight} samples are in flight, and {count} more would exceed this "
                f"server's --pte-max-rollouts {self._limit}; try again later"
            )
        self._counts.add(_KEY, count)

    def leave(self) -> None:
        """Count one sample out, however it ended."""
        self._counts.add(_KEY, -1)


def too_many(message: str) -> Response:
    """Answer 429, with the header that vLLM's handler of HTTPException would drop."""
    body = create_error_response(message, "TooManyRequests", HTTPStatus.TOO_MANY_REQUESTS)
    after = {"Retry-After": str(RETRY_AFTER_S)}
    return JSONResponse(body.model_dump(), HTTPStatus.TOO_MANY_REQUESTS, headers=after)
