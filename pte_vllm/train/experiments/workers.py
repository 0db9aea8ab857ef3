"""Worker processes that experiments run their arms in: they end with the process that started them.

The pool of the standard library leaves its workers behind where the process that has it is killed:
each goes on with the arm that it is at.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.queues import Queue

_told: Queue[str] | None = None
"""Of a worker, where it tells what it has done."""


@contextmanager
def workers(jobs: int) -> Iterator[tuple[ProcessPoolExecutor, Queue[str]]]:
    """Start worker processes; yields the pool, and the queue of what they `tell`.

    Args:
        jobs: how many processes run at once.
    """
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    told: Queue[str] = spawn.Queue()
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(told,)) as pool:
        yield pool, told


def tell(text: str) -> None:
    """Send a line to the process that started this one; outside of a worker nothing happens."""
    if _told is not None:
        _told.put(text)


def _begin(told: Queue[str]) -> None:
    global _told
    _told = told
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # a signal would wait for torch to return to Python
