"""What the API servers of one server note, in one order, in a file that all of them read.

`pte-vllm serve` may run several processes that answer HTTP (`--api-server-count`). Each sees the
requests that reach it, and a later request may reach another one. `earlier` notes requests here;
`server/sharing/` has what else they share.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

_CLEAN_EVERY = 512
_BUSY_S = 30.0
"""How long a write waits for those of other processes; each takes far less than a millisecond."""


def connect(file: Path | None, *tables: str) -> sqlite3.Connection:
    """Open a database that several processes use at once; each statement commits by itself.

    It serves one start of the server, so nothing waits for the disk.

    Args:
        file: of the database; None keeps it in the memory of this process.
        tables: what it has, as `name(columns)`; they are made where they are missing.
    """
    where = file if file is not None else ":memory:"
    database = sqlite3.connect(where, _BUSY_S, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = OFF")
    for table in tables:
        database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    return database


class SharedLog:
    """Notes from old to new.

    Args:
        file: of the database, which is made if there is none.
        keep: about how many notes stay; older ones may leave.
    """

    def __init__(self, file: Path, *, keep: int = 16_384) -> None:
        self._database = connect(file, "notes(number INTEGER PRIMARY KEY AUTOINCREMENT, note TEXT)")
        self._keep = keep
        self._read = self._written = 0

    def append(self, note: Any) -> int:
        """Add a note, anything that JSON holds, for all processes; return its number."""
        rows = self._database.execute(
            "INSERT INTO notes(note) VALUES (?) RETURNING number", (json.dumps(note),)
        )
        ((number,),) = rows.fetchall()
        self._written += 1
        if self._written % _CLEAN_EVERY == 0:
            self._database.execute("DELETE FROM notes WHERE number <= ?", (number - self._keep,))
        return int(number)

    def unread(self) -> list[tuple[int, Any]]:
        """Return what was noted since the last call, by number, this process's own notes too."""
        rows = self._database.execute(
            "SELECT number, note FROM notes WHERE number > ? ORDER BY number", (self._read,)
        ).fetchall()
        if rows:
            self._read = rows[-1][0]
        return [(number, json.loads(note)) for number, note in rows]
