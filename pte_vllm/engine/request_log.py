"""What several API servers note of requests, in one order: a file that all of them write and read.

`pte-vllm serve` may run several processes that answer HTTP (`--api-server-count`). Each sees the
requests that reach it, and a later request may reach another one.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

KEPT_ROWS = 16_384
"""About so many notes stay; older ones may leave."""
_CLEAN_EVERY = 512
BUSY_S = 30.0
"""How long a write waits for those of other processes; each takes far less than a millisecond."""


def connect(file: Path | str) -> sqlite3.Connection:
    """Open a database that several processes use at once; each statement commits by itself.

    It serves one start of the server, so nothing waits for the disk.
    """
    database = sqlite3.connect(file, BUSY_S, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = OFF")
    return database


class RequestLog:
    """Notes about requests, from old to new.

    Args:
        file: of the database, which is made if there is none.
    """

    def __init__(self, file: Path) -> None:
        self._database = connect(file)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS notes"
            "(number INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT, note TEXT)"
        )
        self._read = self._written = 0

    def append(self, request_id: str, note: Any) -> None:
        """Add a note, anything that JSON holds, for all processes."""
        self._database.execute(
            "INSERT INTO notes(request_id, note) VALUES (?, ?)", (request_id, json.dumps(note))
        )
        self._written += 1
        if self._written % _CLEAN_EVERY == 0:
            self._database.execute(
                "DELETE FROM notes WHERE number <= (SELECT max(number) FROM notes) - ?",
                (KEPT_ROWS,),
            )

    def unread(self) -> list[tuple[str, Any]]:
        """Return what was noted since the last call, this process's own notes among them."""
        rows = self._database.execute(
            "SELECT number, request_id, note FROM notes WHERE number > ? ORDER BY number",
            (self._read,),
        ).fetchall()
        if rows:
            self._read = rows[-1][0]
        return [(request_id, json.loads(note)) for _, request_id, note in rows]
