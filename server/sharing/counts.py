"""Counts that go up and down, of all API servers together."""

from __future__ import annotations

from pathlib import Path

from pte_vllm.engine.shared_log import connect


class Counts:
    """Numbers by key; a key whose number is 0 is not there.

    Args:
        file: of the database in which the API servers add up; None for the only one.
    """

    def __init__(self, file: Path | None) -> None:
        self._database = connect(file, "counts(key TEXT PRIMARY KEY, value INTEGER)")

    def add(self, key: str, number: int) -> None:
        """Add a number, which may be negative."""
        self._database.execute(
            "INSERT INTO counts VALUES (?, ?) "
            "ON CONFLICT(key) DO UPDATE SET value = value + excluded.value",
            (key, number),
        )

    def get(self, key: str) -> int:
        """Return the number of a key."""
        rows = self._database.execute("SELECT value FROM counts WHERE key = ?", (key,))
        return next((value for (value,) in rows), 0)

    def keys(self) -> set[str]:
        """Return the keys whose numbers are not 0."""
        return {key for (key,) in self._database.execute("SELECT key FROM counts WHERE value")}

    def clean(self) -> None:
        """Drop keys whose numbers are 0."""
        self._database.execute("DELETE FROM counts WHERE value = 0")
