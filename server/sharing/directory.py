"""The directory that several API servers share, from one start of the server to its end."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

from pte_vllm.engine.shared_log import SharedLog
from pte_vllm.server.sharing.aborts import Aborts
from pte_vllm.server.sharing.answer_records import RecordStore
from pte_vllm.server.sharing.counts import Counts
from pte_vllm.server.sharing.ended_tokens import EndedTokens
from pte_vllm.server.sharing.exclusive import Exclusive
from pte_vllm.server.sharing.totals import Totals
from pte_vllm.server.sharing.versions import SharedVersions


def num_api_servers(args: Namespace) -> int:
    """Return how many API servers answer for a server with these arguments."""
    return args.api_server_count or 1


def share_among(args: Namespace, until: ExitStack) -> None:
    """Make a directory for the API servers of a server, where there are several.

    Args:
        args: the server's arguments, which are sent to each of them.
        until: deletes the directory when it ends.
    """
    args.pte_shared = None
    if num_api_servers(args) > 1:
        made = tempfile.TemporaryDirectory(prefix="pte-vllm-", ignore_cleanup_errors=True)
        args.pte_shared = until.enter_context(made)


class Sharing:
    """Makes what an API server shares with the others.

    Args:
        directory: where the files lie; None for the only API server.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    @classmethod
    def of(cls, args: Namespace) -> Sharing:
        """Return what the server with these arguments shares."""
        directory = getattr(args, "pte_shared", None)
        return cls(Path(directory) if directory is not None else None)

    def _file(self, name: str) -> Path | None:
        return self._directory / name if self._directory is not None else None

    def counts(self, name: str) -> Counts:
        """Return the counts of this name."""
        return Counts(self._file(f"{name}.db"))

    def ended_tokens(self, *, max_count: int, max_bytes: int) -> EndedTokens:
        """Return the tokens of requests that have ended, within these bounds."""
        return EndedTokens(self._file("tokens.db"), max_count=max_count, max_bytes=max_bytes)

    def records(self) -> RecordStore:
        """Return the records of answers."""
        return RecordStore(self._file("records.db"))

    def totals(self) -> Totals:
        """Return the worker's totals."""
        return Totals(self._file("totals.db"))

    def exclusive(self, name: str) -> Exclusive:
        """Return the lock of this name."""
        return Exclusive(self._file(f"{name}.lock"))

    def versions(self) -> SharedVersions | None:
        """Return the table of versions that are served; None for the only API server."""
        file = self._file("versions.db")
        return SharedVersions(file) if file is not None else None

    def request_log(self) -> SharedLog | None:
        """Return the notes about requests; None for the only API server."""
        file = self._file("requests.db")
        return SharedLog(file) if file is not None else None

    def aborts(self) -> Aborts | None:
        """Return what is to be aborted by whoever runs it; None for the only API server."""
        file = self._file("aborts.db")
        return Aborts(file) if file is not None else None
