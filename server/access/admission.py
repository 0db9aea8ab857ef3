"""Back-pressure: how many samples of rollouts and scores may wait or run at once."""

from __future__ import annotations

RETRY_AFTER_S = 5
"""What a client that is turned away is told to wait."""


class BusyError(RuntimeError):
    """There is no room for more samples: HTTP 429."""


class Admission:
    """Counts samples in flight.

    Args:
        limit: a request that would exceed it is turned away; one that comes alone is not.
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
        """One sample is done, whatever its end."""
        self.in_flight -= 1
