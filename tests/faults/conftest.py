"""The tests of faults share small disks, servers, and a look at what a server holds."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.harness.server import Server
from tests.server.conftest import serve  # noqa: F401 (a fixture)


@contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a file system of that size at `directory`; skip the test where none may be mounted."""
    directory.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@dataclass(frozen=True)
class Held:
    """What the API server, the engine core and the worker of a server hold."""

    resident_mib: float
    files: int
    """How many files and sockets are open."""
    threads: int

    @classmethod
    def by(cls, server: Server) -> Held:
        root = psutil.Process(server.pid)
        processes = [root, *root.children(recursive=True)]
        return cls(
            resident_mib=sum(p.memory_info().rss for p in processes) / 2**20,
            files=sum(p.num_fds() for p in processes),
            threads=sum(p.num_threads() for p in processes),
        )
