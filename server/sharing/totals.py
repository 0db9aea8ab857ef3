"""The worker's totals as one of several API servers heard them last: no count may go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pte_vllm.engine.shared_log import connect


class Totals:
    """The totals that were asked for last, whoever asked.

    Args:
        file: of the database that the API servers share; None for the only one.
    """

    def __init__(self, file: Path | None) -> None:
        table = "totals(only INTEGER PRIMARY KEY, asked REAL, totals TEXT)"
        self._database = connect(file, table)

    def put(self, asked: float, totals: dict[str, Any]) -> None:
        """Remember totals, unless there are some that were asked for later.

        Args:
            asked: when, by the monotonic clock, which is that of all processes.
            totals: what the worker answered.
        """
        self._database.execute(
            "INSERT INTO totals VALUES (0, ?, ?) ON CONFLICT(only) DO UPDATE "
            "SET asked = excluded.asked, totals = excluded.totals WHERE asked < excluded.asked",
            (asked, json.dumps(totals)),
        )

    def get(self) -> tuple[float, dict[str, Any] | None]:
        """Return when the last totals were asked for, and what they are; None before the first."""
        rows = self._database.execute("SELECT asked, totals FROM totals").fetchall()
        return (rows[0][0], json.loads(rows[0][1])) if rows else (float("-inf"), None)
