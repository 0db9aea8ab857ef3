"""Records of answers by the name that their requests gave, of all API servers, within bounds."""

from __future__ import annotations

from pathlib import Path

from pte_vllm.engine.shared_log import connect

MAX_BYTES = 2**28
"""The most memory for records; the oldest leave, whatever their name."""


class RecordStore:
    """Lines of records, until somebody drops them or newer ones need the room.

    Args:
        file: of the database that the API servers share; None for the only one.
        max_bytes: the most that a record and all newer ones may take; else it leaves.
    """

    def __init__(self, file: Path | None, *, max_bytes: int = MAX_BYTES) -> None:
        # `first` and `last` bound its bytes in the row of all records, so that nothing is added up.
        columns = "name TEXT, line BLOB, first INTEGER, last INTEGER"
        number = "number INTEGER PRIMARY KEY AUTOINCREMENT"
        self._database = connect(file, f"records({number}, {columns})")
        for column in ("name", "first", "last"):
            self._database.execute(
                f"CREATE INDEX IF NOT EXISTS records_by_{column} ON records({column})"
            )
        self._max_bytes = max_bytes

    def add(self, name: str, line: bytes) -> None:
        """Keep one more record under a name.

        Raises:
            ValueError: if it alone takes more than all may.
        """
        if len(line) > self._max_bytes:
            raise ValueError(f"a record of {len(line)} bytes exceeds the room of all records")
        self._database.execute(
            "INSERT INTO records(name, line, first, last) "
            "SELECT ?, ?, COALESCE(MAX(last), 0), COALESCE(MAX(last), 0) + ? FROM records",
            (name, line, len(line)),
        )
        self._database.execute(
            "DELETE FROM records WHERE first < (SELECT MAX(last) FROM records) - ?",
            (self._max_bytes,),
        )

    def get(self, name: str) -> tuple[int, list[bytes]]:
        """Return the number of a name's last record, and its records, in the order of their ends.

        The number is 0 without any.
        """
        rows = self._database.execute(
            "SELECT number, line FROM records WHERE name = ? ORDER BY number", (name,)
        ).fetchall()
        return (rows[-1][0] if rows else 0), [bytes(line) for _, line in rows]

    def drop(self, name: str, last: int | None = None) -> int:
        """Forget the records of a name, all or those up to a number; return how many there were."""
        upto = "" if last is None else "AND number <= :last"
        values = {"name": name, "last": last}
        return self._database.execute(
            f"DELETE FROM records WHERE name = :name {upto}", values
        ).rowcount
