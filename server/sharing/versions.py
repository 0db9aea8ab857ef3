"""The versions of pushed adapters that all API servers serve, as rows of one table.

An adapter is a version once its files are in the spool, and it is served once all engines have
loaded it: then it gets a row. The engines know it by a number that every API server has to use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.engine.shared_log import connect


@dataclass(frozen=True, kw_only=True)
class ServedVersion:
    """One row."""

    engine_name: str
    adapter_id: int
    """The engines' number for it."""
    about: dict[str, Any]
    """Whatever else the API servers have to know."""


class SharedVersions:
    """The table of one server.

    Args:
        file: of the database, which is made if there is none.
    """

    def __init__(self, file: Path) -> None:
        self._database = connect(
            file,
            "versions(engine_name TEXT PRIMARY KEY, adapter_id INTEGER, about TEXT)",
            "numbers(name TEXT PRIMARY KEY, value INTEGER)",
        )
        self._seen: int | None = None

    def changed(self) -> bool:
        """Return whether another process may have changed the table since the last call."""
        (version,) = self._database.execute("PRAGMA data_version").fetchone()
        changed, self._seen = version != self._seen, version
        return changed

    def rows(self) -> list[ServedVersion]:
        """Return all rows."""
        return [
            ServedVersion(engine_name=name, adapter_id=number, about=json.loads(about))
            for name, number, about in self._database.execute("SELECT * FROM versions")
        ]

    def put(self, row: ServedVersion) -> None:
        """Add a row."""
        self._database.execute(
            "INSERT OR REPLACE INTO versions VALUES (?, ?, ?)",
            (row.engine_name, row.adapter_id, json.dumps(row.about)),
        )

    def remove(self, engine_name: str) -> None:
        """Remove a row, if it is there."""
        self._database.execute("DELETE FROM versions WHERE engine_name = ?", (engine_name,))

    def first(self, what: str) -> bool:
        """Return whether this is the first call with `what`, of all processes."""
        return self.next_number(what, after=0) == 1

    def next_number(self, name: str, *, after: int) -> int:
        """Return `after + 1`, and one more with each call of any process."""
        ((value,),) = self._database.execute(
            "INSERT INTO numbers VALUES (?, ?) "
            "ON CONFLICT(name) DO UPDATE SET value = value + 1 RETURNING value",
            (name, after + 1),
        ).fetchall()
        return int(value)


class AdapterNumbers:
    """Hands out the engines' numbers of adapters, in place of vLLM's counter of one process.

    Args:
        versions: the table that knows which numbers are taken.
        after: the highest number that every API server gave to the same adapter at its start.
    """

    def __init__(self, versions: SharedVersions, *, after: int) -> None:
        self._versions, self._after = versions, after

    def inc(self, num: int = 1) -> int:
        """Return the next number, as vLLM's AtomicCounter does."""
        assert num == 1, num
        return self._versions.next_number("adapter", after=self._after)
