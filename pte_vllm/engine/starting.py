"""A stop while a server starts ends all of its processes at once.

vLLM 0.32 would raise KeyboardInterrupt wherever its main thread is, while its engine core takes
note of the signal and goes on loading the model: to end may take longer than to start. Nobody has
been answered yet, so nothing is worth waiting for.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KEEPER = b"multiprocessing.resource_tracker"
"""Deletes shared memory once its users are gone, and ends by itself then."""


def end_at_once_when_stopped() -> None:
    """Have SIGTERM and SIGINT end this process and all below it, with status 128 + signal.

    It holds until vLLM's server, which answers its requests first, sets handlers of its own. Call
    it in the main thread.
    """
    for number in _SIGNALS:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    # Not print: the signal may have come in the middle of one.
    os.write(2, f"pte-vllm: stopped by {name} while the server started\n".encode())
    kill_descendants()
    os._exit(128 + number)


def kill_descendants() -> None:
    """Kill every process below this one, whatever it is doing."""
    found: set[int] = set()
    while new := _children({os.getpid(), *found}) - found:
        for pid in new:
            # Held first: one that was killed would leave behind a child that it is just starting.
            _send(pid, signal.SIGSTOP)
        found |= new
    for pid in found:
        _send(pid, signal.SIGKILL)


def _children(parents: set[int]) -> set[int]:
    children = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended since
            # After the name, which may hold anything: the state, then the parent.
            parent = int((path / "stat").read_bytes().rpartition(b")")[2].split()[1])
            if parent in parents and _KEEPER not in (path / "cmdline").read_bytes():
                children.add(int(path.name))
    return children


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
