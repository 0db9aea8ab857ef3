"""The process behind `ScoringWorker`: makes scorers, and scores what a model wrote.

Once the first scorer is made, these hold until the process ends:

- 2 GiB of memory, no core dumps, no bytes into files (`RLIMIT_AS`, `_CORE`, `_FSIZE`);
- Python refuses programs, processes, sockets, functions of ctypes, files opened for writing, and
  files removed, renamed, made or changed (`sys.addaudithook`). Imports and reads stay, as sympy
  imports late.

That is no sandbox. The hook sees what Python chooses to report, and code that runs here can get
around it; it reads every file that the user may read. It keeps accidents small, and what a model
finds by chance; what answers may say at all is limited before (`gym_tasks.may_be_evaluated`).
Who trains on answers of people with bad intent needs a container around the trainer.

A request is a pickle `(cpu_s, clock_s, setup, answer)`. To each the process says READY, once it has
the scorer, or FAILED and why; after READY follows the score, each on a line of its own.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

READY = b"ready\n"
FAILED = b"failed: "

_MEMORY_BYTES = 2 * 2**30
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# fmt: off
_REFUSED = {
    "os", "subprocess", "_posixsubprocess", "pty", "signal", "_thread", "resource", "gc", "socket",
    "ctypes", "shutil", "tempfile", "sqlite3", "mmap", "fcntl", "syslog",
}
"""Audit events by what stands before their dot."""
_ALLOWED = {
    "os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr",
    "ctypes.dlopen",  # importing ctypes opens the program itself
    "os.putenv", "os.unsetenv",  # importing numpy sets variables for OpenBLAS
}
"""Events of that kind that only read, or that imports need."""
# fmt: on


def _guard(event: str, args: tuple[Any, ...]) -> None:
    """Refuse, as an audit hook, what a scorer should not do.

    Raises:
        PermissionError: for what no scorer needs; code that can do without catches it as OSError.
    """
    if event == "open":
        if args[2] & _WRITING:
            raise PermissionError(f"a scorer may not write {args[0]!r}")
    elif event.partition(".")[0] in _REFUSED and event not in _ALLOWED:
        raise PermissionError(f"a scorer may not use {event}")


def _restrict() -> None:
    """Take away what scoring does not need, for good."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    sys.addaudithook(_guard)


def _score(
    scorer: Callable[..., float], answer: tuple[Any, ...], cpu_s: float, clock_s: float
) -> float:
    """Score from 0 to 1; 0 whatever is raised, `SystemExit` and the lack of memory included.

    The process ends where that takes more than `cpu_s` of its CPU, or far more of the clock: the
    trainer keeps that time, and may be gone.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, clock_s + 1)
    try:
        value = float(scorer(*answer))
    except BaseException:
        return 0.0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def _serve(work: str) -> None:
    """Answer until the input ends, as it does when the trainer dies."""
    # Nothing but requests and replies may use their pipes; `exit()` closes stdin.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    logging.disable()
    module, _, name = work.partition(":")
    make = lru_cache(maxsize=16)(getattr(importlib.import_module(module), name))
    restricted = False
    while True:
        try:
            cpu_s, clock_s, setup, answer = pickle.load(requests)
        except EOFError:
            return
        try:
            scorer = make(*setup)
        except Exception as error:
            os.write(replies, FAILED + repr(error).encode("ascii", "backslashreplace") + b"\n")
            continue
        if not restricted:
            os.dup2(nowhere, 2)  # parsers comment on every formula they do not like
            _restrict()
            restricted = True
        os.write(replies, READY)
        os.write(replies, f"{_score(scorer, answer, cpu_s, clock_s)}\n".encode())


if __name__ == "__main__":
    _serve(sys.argv[1])
