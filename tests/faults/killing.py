"""Runs a function in a process that is killed, as by `kill -9`, at a chosen step of its file work.

A step is any call of Python's that changes or syncs files below a directory, told by audit hooks;
what libraries write without Python counts as part of the step before it. Reading does not count.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENT = "pte.tests.step"
"""`sys.audit(EVENT)` is a step too."""
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}
# Children are forked from a process that has imported what they need, and runs nothing else.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.trainer", "tests.faults.spooling"])


def run_killed(
    step: int | None, directory: Path, target: Callable[..., None], *args: Any
) -> int | None:
    """Run `target(*args)` in a process that is killed before its step number `step`, from 1.

    Args:
        step: None: it runs to its end.
        directory: below which steps count.
        target: importable by name.
        args: its arguments, which can be pickled.

    Returns:
        None if it was killed; else how many steps it took.
    """
    reader, writer = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_child, args=(writer, step, str(directory), target, args))
    process.start()
    writer.close()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, f"ended with {process.exitcode}, see its output"
    taken: int = reader.recv()
    return taken


def _child(
    writer: Any, step: int | None, directory: str, target: Callable[..., None], args: Any
) -> None:
    taken = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal taken
        reads = event == "open" and values[1] in ("r", "rb")
        if event == EVENT or (event in _CHANGES and not reads and _below(directory, values)):
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    target(*args)
    writer.send(taken)


def _below(directory: str, values: tuple[Any, ...]) -> bool:
    return any(isinstance(v, str | os.PathLike) and directory in os.fspath(v) for v in values)
