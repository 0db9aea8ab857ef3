"""Scores of what a model wrote, from a worker: a process that can be killed.

What a model writes may keep a scorer busy for ever inside one call that no signal and no thread
can interrupt (`9^{9^{9^9}}`), take all memory, or run, as some scorers evaluate it. So none of it
is scored in the trainer. The worker is `scoring_process`, which says what it is kept from; it is
killed when a decision takes too long, and started again for the next one.

The trainer sends pickles, which are its own; what comes back is read as a number and nothing else.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pte_vllm.train.rewards.scoring_process import FAILED, READY

_PROCESS = "pte_vllm.train.rewards.scoring_process"
PATIENCE = 12.0
"""By how much the clock may run ahead of the worker's CPU."""
_START_S = 120.0
"""For imports on a busy machine, and for making a scorer."""

Work = Callable[..., Callable[..., float]]
"""A function of a module, found there by name: makes a scorer from hashable values."""


class ScoringWorker:
    """Owns the worker; starts it when first asked, again after it ended. Thread-safe.

    Args:
        work: the function that makes the scorers, called in the worker, which keeps them.
        timeout_s: the longest time for one decision; what takes longer earns 0. It is time of the
            CPU, as a busy or stopped machine is no fault of the answer; of the clock's `PATIENCE`
            times as much may pass.
    """

    def __init__(self, work: Work, *, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self._work = f"{work.__module__}:{work.__qualname__}"
        self._lock = threading.Lock()
        self._running: _Running | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the worker; None if none was started."""
        return None if self._running is None else self._running.process.pid

    def score(self, setup: tuple[object, ...], answer: tuple[object, ...]) -> float:
        """Ask the worker for `work(*setup)(*answer)`, from 0 to 1.

        It is 0 if that raises, takes too long, or ends the worker.

        Raises:
            OSError: if the worker does not start, or cannot make the scorer.
        """
        request = pickle.dumps((self.timeout_s, PATIENCE * self.timeout_s, setup, answer))
        with self._lock:
            running = self._asked(request)
            reply = running.read_line(PATIENCE * self.timeout_s)
            try:
                return float(reply)
            except ValueError:
                self._stop()
                return 0.0

    def close(self) -> None:
        """End the worker; it starts again if asked again."""
        with self._lock:
            self._stop()

    def _asked(self, request: bytes) -> _Running:
        """Return the worker, once it has a scorer for the request and begins to use it."""
        for _ in range(2):  # the first may have been killed from outside
            if self._running is None or self._running.process.poll() is not None:
                self._stop()
                self._running = _Running.start(self._work)
                atexit.register(self.close)
            reply = self._running.send(request)
            if reply == READY:
                return self._running
            if reply.startswith(FAILED):
                raise OSError(reply.removeprefix(FAILED).decode().strip())
            self._stop()
        raise OSError(f"the worker for scores was not ready within {_START_S:.0f} s, or ended")

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            atexit.unregister(self.close)
            running.end()


@dataclass(frozen=True)
class _Running:
    """A worker's process, and the directory that it takes for home."""

    process: subprocess.Popen[bytes]
    home: tempfile.TemporaryDirectory[str]

    @classmethod
    def start(cls, work: str) -> _Running:
        home = tempfile.TemporaryDirectory(prefix="pte-scoring-")
        process = subprocess.Popen(
            [sys.executable, "-m", _PROCESS, work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(home.name),
            cwd=home.name,
            start_new_session=True,  # Ctrl-C is the trainer's
        )
        return cls(process, home)

    def send(self, request: bytes) -> bytes:
        """Return what the worker says to a request before it scores; empty if it ended or hangs."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self.read_line(_START_S)

    def read_line(self, timeout_s: float) -> bytes:
        """Return a line of the worker's; empty if it takes longer or ends."""
        assert self.process.stdout is not None
        file, line = self.process.stdout.fileno(), b""
        end = time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                return b""
            part = os.read(file, 1)  # the next line may be there already
            if not part:
                return b""
            line += part
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # a request it never read
                continue
        self.home.cleanup()


def _environment(home: str) -> dict[str, str]:
    """Return the worker's variables: no tokens, no proxies, and the trainer's import path."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "HOME": home,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONWARNINGS": "ignore",
        # Threads of BLAS take address space, which is limited, for nothing.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
