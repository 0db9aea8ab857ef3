"""Ends a run when told to, without losing what it did."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(Exception):
    """SIGTERM or SIGINT came while a batch was being sampled; nothing of it is lost."""


class Signals:
    """SIGTERM and SIGINT end the run after the step, or at once while it only waits for answers.

    A second signal acts as it did before.
    """

    def __init__(self) -> None:
        self.came = False
        """Whether one of the signals came."""
        self._interrupting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._reset()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal inside the block raise Interrupted, and at once if one came before."""
        if self.came:
            raise Interrupted
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._reset()
        if self._interrupting:
            raise Interrupted

    def _reset(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
