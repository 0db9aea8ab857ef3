"""Adapter versions on their way to the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.wire.transport import CONFLICT, ServerError, Transport


class Pushes:
    """Sends the files of adapters.

    Args:
        http: the server.
        headers: what lets in those who may push.
    """

    def __init__(self, http: Transport, headers: Mapping[str, str]) -> None:
        self._http, self._headers = http, dict(headers)

    def push_next(
        self, path: Path, name: str, adapters: Callable[[], dict[str, dict[str, Any]]]
    ) -> int:
        """Push under the first number that is free, and return it.

        Args:
            path: the adapter's directory.
            name: its name at the server.
            adapters: tells the adapters that were pushed, by name.

        Raises:
            ServerError: if the server refuses, or stays away.
        """
        number = 0
        while True:
            # Decided before it is sent, so that a retry cannot push the same files twice.
            known = adapters().get(name)
            number = max(number, known["newest"] if known is not None else 0) + 1
            try:
                return self.push(path, name, number)
            except ServerError as error:
                if error.status != CONFLICT:  # somebody else's push took the number
                    raise

    def push(self, path: Path, name: str, version: int) -> int:
        """Push a directory under a number, and return that.

        Raises:
            FileNotFoundError: if there is no adapter in it.
            ServerError: if the server refuses, or stays away.
        """
        hashes = file_hashes(path)
        if not hashes:
            raise FileNotFoundError(f"{path} holds no adapter")
        reply = self._http.json(
            "PUT",
            f"/pte/v1/adapters/{name}",
            headers=self._headers,
            data={"sha256": content_hash(hashes), "version": str(version)},
            files={file: (file, (path / file).read_bytes()) for file in hashes},
        )
        return int(reply["version"])
