"""Whether two answers are equal as mathematics, decided by `math-verify` in a process of its own.

What a model writes may take sympy for ever inside one call that no signal and no thread can
interrupt (`9^{9^{9^9}}`), or all memory. So a worker with a limit on memory decides, and is killed
when it takes too long. The worker is this module, run by itself: one JSON array `[right, answer]` a
line in, `1` or `0` a line out.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import resource
import select
import subprocess
import sys
import threading
import time

_START_S = 120.0  # importing sympy on a busy machine
_MEMORY_BYTES = 2 * 2**30


class MathChecker:
    """Owns the worker; starts it when first asked, again after it was killed. Thread-safe.

    Args:
        timeout_s: longest time for one decision; what takes longer is not equal.

    Raises:
        ModuleNotFoundError: if math-verify is not installed.
    """

    def __init__(self, *, timeout_s: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("No module named 'math_verify' (install pte-vllm[train])")
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def equal(self, right: str, answer: str) -> bool:
        """Whether `answer` equals `right`; both LaTeX or plain, without dollars or box.

        Raises:
            OSError: if the worker does not start.
        """
        request = json.dumps([right, answer]).encode() + b"\n"
        with self._lock:
            worker = self._start()
            assert worker.stdin is not None
            try:
                worker.stdin.write(request)
                worker.stdin.flush()
                reply = _read_line(worker, self.timeout_s)
            except BrokenPipeError:
                reply = b""
            if reply not in (b"1\n", b"0\n"):  # too slow, or out of memory
                self._stop()
            return reply == b"1\n"

    def close(self) -> None:
        """End the worker; it starts again if asked again."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._stop()
        self._worker = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the trainer's
        )
        if _read_line(self._worker, _START_S) != b"ready\n":
            self._stop()
            raise OSError(f"the worker of math-verify did not start within {_START_S:.0f} s")
        return self._worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # a request it never read
                continue


def _read_line(worker: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """A line of the worker's; empty if it takes longer or ends."""
    assert worker.stdout is not None
    file, line = worker.stdout.fileno(), b""
    end = time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([file], [], [], left)[0]:
            return b""
        part = os.read(file, 4096)
        if not part:
            return b""
        line += part
    return line


def _work() -> None:
    """The worker: answers until its input ends, as it does when the trainer dies."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # nothing but replies may go where replies go
    os.write(replies, b"ready\n")
    os.dup2(nowhere, 2)  # the parser comments on every formula it does not like
    for line in sys.stdin:
        # The trainer keeps the time, hence no timeouts here. Both return a value on any error.
        right, answer = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line)
        )
        equal = bool(right and answer) and verify(right, answer, timeout_seconds=None)
        os.write(replies, b"1\n" if equal else b"0\n")


if __name__ == "__main__":
    _work()
