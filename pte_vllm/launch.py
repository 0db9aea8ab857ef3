"""A `pte-vllm serve` process of our own: start it, wait until it answers, stop all of it.

Standard library only. The server is several processes; they share a process group that nobody else
is in, and `stop` ends exactly that group.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

HOST = "127.0.0.1"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


class LaunchError(RuntimeError):
    """A process we started failed; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def http_get(url: str, *, timeout_s: float = 5.0) -> bytes:
    """Body of a GET that got status 200.

    Raises:
        OSError: if there is no such answer (`urllib.error.URLError` is one).
    """
    with _DIRECT.open(url, timeout=timeout_s) as response:
        body: bytes = response.read()
        return body


def log_tail(log: Path, num_lines: int) -> str:
    """Last lines of a log that are not blank; "" if there is none yet."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 500 * num_lines))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-num_lines:])


def pte_command(*args: str) -> list[str]:
    """`pte-vllm ARGS` with this process's interpreter."""
    return [sys.executable, "-m", "pte_vllm", *args]


class ProcessGroup:
    """A command in a process group of its own; a context manager that leaves nothing behind.

    Args:
        command: program and arguments.
        log: receives stdout and stderr.
        env: added to this process's environment.
        grace_s: time between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        grace_s: float = 20.0,
    ) -> None:
        self.command = list(command)
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self.grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ProcessGroup:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = self._start(log)
        return self

    def _start(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.env,
            # Not a session of its own: Linux divides the CPU by session first, then by nice.
            process_group=0,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the command itself."""
        assert self._process is not None, "not started"
        return self._process.pid

    def exit_status(self) -> int | None:
        """Of the command itself; None while it runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    def wait_until(
        self,
        done: Callable[[], bool],
        *,
        timeout_s: float,
        on_wait: Callable[[str], None] = lambda line: None,
        poll_s: float = 0.25,
    ) -> None:
        """Wait for `done()`, showing `on_wait` the last line of the log.

        Raises:
            LaunchError: if the command ends first, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            status = self.exit_status()
            if status is not None:
                raise self._failure(f"ended with status {status}")
            if time.monotonic() > deadline:
                raise self._failure(f"was not ready after {timeout_s:.0f} s")
            on_wait(log_tail(self.log, 1))
            time.sleep(poll_s)

    def wait_exit(
        self, *, timeout_s: float, on_wait: Callable[[str], None] = lambda line: None
    ) -> None:
        """Wait for the command to end with status 0.

        Raises:
            LaunchError: if the status is another, or the time is up.
        """
        self.wait_until(lambda: self.exit_status() == 0, timeout_s=timeout_s, on_wait=on_wait)

    def stop(self) -> None:
        """SIGTERM to the group, time to end, then SIGKILL; idempotent.

        Holds back Ctrl-C and SIGTERM meanwhile: an impatient second one would leave processes.
        """
        process = self._process
        if process is None:
            return
        held_back = {signal.SIGINT, signal.SIGTERM}
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
        try:
            for sign, wait_s in ((signal.SIGTERM, self.grace_s), (signal.SIGKILL, 5.0)):
                deadline = time.monotonic() + wait_s
                _signal_group(process.pid, sign)
                while time.monotonic() < deadline:
                    process.poll()  # reaps the leader, which else keeps the group alive
                    if not _signal_group(process.pid, 0):
                        break
                    time.sleep(0.05)
                else:
                    continue
                break
            process.wait()
            self._process = None
        finally:
            if main_thread:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _failure(self, what: str) -> LaunchError:
        shown = " ".join(self.command[:6]) + (" ..." if len(self.command) > 6 else "")
        return LaunchError(
            f"`{shown}` {what}; end of {self.log}:\n{log_tail(self.log, 25) or '(empty)'}"
        )


def _signal_group(pgid: int, sign: int) -> bool:
    """Whether the group still has a member; 0 signals nothing."""
    try:
        os.killpg(pgid, sign)
    except ProcessLookupError:
        return False
    return True


class Server(ProcessGroup):
    """`pte-vllm serve` on a local port.

    Args:
        serve_args: what follows `pte-vllm serve`, without host and port.
        port: 0 takes a free one.
        log: receives the server's output.
    """

    def __init__(self, serve_args: Sequence[str], *, port: int = 0, log: Path, **kwargs: Any):
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        command = pte_command("serve", *serve_args, "--host", HOST, "--port", str(self.port))
        super().__init__(command, log=log, **kwargs)

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, self.port)) == 0:
                raise LaunchError(f"port {self.port} is taken; choose another, or 0 for a free one")
        super().__enter__()
        return self

    def healthy(self) -> bool:
        """Whether `GET /health` answers."""
        try:
            http_get(f"{self.url}/health", timeout_s=2.0)
        except OSError:
            return False
        return True

    def wait_ready(
        self, *, timeout_s: float = 600.0, on_wait: Callable[[str], None] = lambda line: None
    ) -> None:
        """Wait for `/health`; raises as `wait_until` does."""
        self.wait_until(self.healthy, timeout_s=timeout_s, on_wait=on_wait)
