"""Runs `pte-vllm adapter push-hub` and `pull` against the hub of the tests."""

from __future__ import annotations

from pathlib import Path

from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.cli.main import main
from tests.harness.hub import Hub

REPO = "someone/thoughts"


def run(hub: Hub, *words: str | Path, token: str | None = "WRITER") -> int:
    """Run the words after `pte-vllm adapter`; returns the exit status.

    The token is in the environment variable that is named; None: the command is given none.
    """
    access = ["--endpoint", hub.url, *(["--token-env", token] if token else [])]
    return main(["adapter", *(str(word) for word in words), *access])


def hash_of(path: Path) -> str:
    """Return the hash of the adapter in a directory."""
    return content_hash(file_hashes(path))
