"""The tokens of requests that have ended, of all API servers, within bounds."""

from __future__ import annotations

from array import array
from pathlib import Path

from pte_vllm.engine.shared_log import connect


class EndedTokens:
    """Tokens by the engine's id of their request; the oldest leave.

    Args:
        file: of the database that the API servers share; None for the only one.
        max_count: the most requests.
        max_bytes: the most memory, at four bytes a token.
    """

    def __init__(self, file: Path | None, *, max_count: int, max_bytes: int) -> None:
        number = "number INTEGER PRIMARY KEY AUTOINCREMENT"
        self._database = connect(file, f"ended({number}, request_id TEXT UNIQUE, tokens BLOB)")
        self._max_count, self._max_bytes = max_count, max_bytes

    def put(self, request_id: str, tokens: array[int]) -> None:
        """Remember what a request wrote, in place of an older one of that id."""
        self._database.execute(
            "INSERT OR REPLACE INTO ended(request_id, tokens) VALUES (?, ?)",
            (request_id, tokens.tobytes()),
        )
        sizes = self._database.execute(
            "SELECT number, length(tokens) FROM ended ORDER BY number DESC"
        ).fetchall()
        num_bytes = 0
        for count, (number, size) in enumerate(sizes, start=1):
            num_bytes += size
            if count > self._max_count or num_bytes > self._max_bytes:
                self._database.execute("DELETE FROM ended WHERE number <= ?", (number,))
                return

    def names(self) -> list[str]:
        """Return the ids, from old to new."""
        rows = self._database.execute("SELECT request_id FROM ended ORDER BY number")
        return [request_id for (request_id,) in rows]

    def get(self, request_id: str) -> array[int] | None:
        """Return what a request wrote; None if it is unknown."""
        rows = self._database.execute(
            "SELECT tokens FROM ended WHERE request_id = ?", (request_id,)
        )
        return next((array("i", tokens) for (tokens,) in rows), None)

    def drop(self, request_id: str) -> None:
        """Forget a request; does nothing if it is unknown."""
        self._database.execute("DELETE FROM ended WHERE request_id = ?", (request_id,))
