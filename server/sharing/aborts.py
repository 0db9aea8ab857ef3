"""Requests to be aborted by the API server that runs them, whichever was asked to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pte_vllm.engine.shared_log import SharedLog, connect

_KEPT = 1024
"""The newest questions whose answers stay."""


@dataclass(frozen=True, kw_only=True)
class Abort:
    """What another API server was asked to do."""

    number: int
    request_ids: list[str] | None
    """The ids that clients know; None is all that run."""


class Aborts:
    """What was asked for, from old to new, and who has done it.

    Args:
        file: of the database, which is made if there is none.
    """

    def __init__(self, file: Path) -> None:
        self._asked = SharedLog(file)
        self._database = connect(file, "done(number INTEGER, aborted INTEGER)")
        self._asked.unread()  # what was asked for before is none of this process's requests

    def ask(self, request_ids: list[str] | None) -> int:
        """Ask the others to abort requests, None is all; return the number of the question."""
        return self._asked.append([os.getpid(), request_ids])

    def unread(self) -> list[Abort]:
        """Return what the others asked for since the last call."""
        return [
            Abort(number=number, request_ids=request_ids)
            for number, (asker, request_ids) in self._asked.unread()
            if asker != os.getpid()
        ]

    def done(self, number: int, aborted: int) -> None:
        """Tell that this process has done what a question asks, for so many requests."""
        self._database.execute("INSERT INTO done VALUES (?, ?)", (number, aborted))
        self._database.execute("DELETE FROM done WHERE number <= ?", (number - _KEPT,))

    def answers(self, number: int) -> list[int]:
        """Return how many requests each process aborted that has answered a question."""
        rows = self._database.execute("SELECT aborted FROM done WHERE number = ?", (number,))
        return [aborted for (aborted,) in rows]
