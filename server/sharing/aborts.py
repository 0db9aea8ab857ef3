"""Requests to be aborted by the API server that runs them, whichever was asked to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pte_vllm.engine.request_log import connect

_KEPT = 1024


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
        self._database = connect(file)
        for columns in (
            "asked(number INTEGER PRIMARY KEY AUTOINCREMENT, asker INTEGER, request_ids TEXT)",
            "done(number INTEGER, aborted INTEGER)",
        ):
            self._database.execute(f"CREATE TABLE IF NOT EXISTS {columns}")
        self._read = 0
        self.unread()  # what was asked for before is none of this process's requests

    def ask(self, request_ids: list[str] | None) -> int:
        """Ask the others to abort requests, None is all; return the number of the question."""
        cursor = self._database.execute(
            "INSERT INTO asked(asker, request_ids) VALUES (?, ?)",
            (os.getpid(), json.dumps(request_ids)),
        )
        number = cursor.lastrowid
        assert number is not None
        for table in ("asked", "done"):
            self._database.execute(f"DELETE FROM {table} WHERE number <= ?", (number - _KEPT,))
        return number

    def unread(self) -> list[Abort]:
        """Return what the others asked for since the last call."""
        rows = self._database.execute(
            "SELECT number, asker, request_ids FROM asked WHERE number > ? ORDER BY number",
            (self._read,),
        ).fetchall()
        if rows:
            self._read = rows[-1][0]
        return [
            Abort(number=number, request_ids=json.loads(request_ids))
            for number, asker, request_ids in rows
            if asker != os.getpid()
        ]

    def done(self, number: int, aborted: int) -> None:
        """Tell that this process has done what a question asks, for so many requests."""
        self._database.execute("INSERT INTO done VALUES (?, ?)", (number, aborted))

    def answers(self, number: int) -> list[int]:
        """Return how many requests each process aborted that has answered a question."""
        rows = self._database.execute("SELECT aborted FROM done WHERE number = ?", (number,))
        return [aborted for (aborted,) in rows]
