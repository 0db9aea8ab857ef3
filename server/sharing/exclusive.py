"""A lock that one coroutine holds, of all API servers."""

from __future__ import annotations

import asyncio
import fcntl
from pathlib import Path
from typing import IO

_POLL_S = 0.02


class Exclusive:
    """An asynchronous context manager, which only one at a time is in.

    Args:
        file: what the API servers lock; None for the only one.
    """

    def __init__(self, file: Path | None) -> None:
        self._mine = asyncio.Lock()
        self._file: IO[str] | None = file.open("a") if file is not None else None

    async def __aenter__(self) -> None:
        await self._mine.acquire()
        try:
            while self._file is not None and not _locked(self._file):
                await asyncio.sleep(_POLL_S)
        except BaseException:
            self._mine.release()
            raise

    async def __aexit__(self, *error: object) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._mine.release()


def _locked(file: IO[str]) -> bool:
    """Return whether a file is locked by this process now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
