"""Processes of test servers, forked from one that has imported vLLM: most of a start is imports.

A server is three processes or more, and each imports vLLM anew, for two thirds of what the start
costs. Here a process with one thread imports it once and computes nothing, and the server's command
is a fork of it. So are the processes that the server starts with the method `spawn`, as vLLM does:
each asks a process of its own for them, its stem, which it forked before it did anything else.

Everything else is as it is with `exec`: environment, open files, exit status, parent and process
group. Tests of the command line, of starts and of stops while a server starts run the real one.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib.util
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import Any

import setproctitle

IMPORTED = (
    "pte_vllm.cli.serve",
    "pte_vllm.serve",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
"""By every process of a server, whatever it serves."""
_READ_EARLY = ("HF_", "KMP_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TRITON_INTERPRET")
"""Prefixes of variables that libraries read as they are loaded."""
_LARGEST_MESSAGE, _MOST_FDS = 1 << 20, 200
_ABOVE = 1000
"""Numbers of files that a command does not use."""
_SET_CHILD_SUBREAPER = 36
_EXEC = util.spawnv_passfds


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a new process is to run, and with what.

    Args:
        argv: a command line of Python's, with `-m` or `-c`.
        fds: the numbers of its open files; all others are closed.
        leads: it leads a process group of its own.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    directory: str
    fds: Sequence[int]
    leads: bool

    def run(self) -> None:
        """Do what `python` does with the command line; the caller then ends."""
        at = min(self.argv.index(flag) for flag in ("-m", "-c") if flag in self.argv)
        flag, program, *args = self.argv[at:]
        sys.argv = [flag, *args]
        if flag == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(program, sys.modules["__main__"].__dict__)


class Stem:
    """The end of a socket at which new processes are asked for.

    They become children of this process, whose waiting for them works as for any other.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end, self._lock = end, threading.Lock()

    def start(self, command: Command, fds: Sequence[int]) -> int:
        """Return the id of the process; `fds` are this process's own, for the command's in turn.

        Raises:
            ConnectionError: if the stem has ended.
        """
        with self._lock:
            _adopt(True)
            try:
                socket.send_fds(self._end, [pickle.dumps(command)], list(fds))
                answer = self._end.recv(_LARGEST_MESSAGE)
            finally:
                _adopt(False)
        if not answer:
            raise ConnectionError("the stem has ended")
        return int(answer)

    def spawnv_passfds(self, path: bytes, args: Sequence[Any], fds: Sequence[int]) -> int:
        """Take the place of `multiprocessing.util.spawnv_passfds`."""
        if "--multiprocessing-fork" not in args:  # its tracker of resources
            return _EXEC(path, args, fds)
        passed = sorted({0, 1, 2, *map(int, fds)})
        command = Command(
            argv=args, environ=dict(os.environ), directory=os.getcwd(), fds=passed, leads=False
        )
        try:
            return self.start(command, passed)
        except ConnectionError:
            return _EXEC(path, args, fds)


class Zygote(Stem):
    """The process from which all others come; it begins with the first and ends with its maker."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(ours)
        torch = importlib.util.find_spec("torch")
        assert torch is not None and torch.origin is not None
        # vLLM has every engine core and worker load it first.
        openmp = sorted(Path(torch.origin).parent.glob("lib/libgomp*.so*"))
        self.environ = {"LD_PRELOAD": ":".join(map(str, openmp[:1])), **os.environ}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Command, fds: Sequence[int]) -> int:
        if self._process is None:
            with self._theirs as theirs:
                words = ["-c", f"from {__name__} import main; main()", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    [sys.executable, *words],
                    pass_fds=[theirs.fileno()],
                    env=self.environ,
                    process_group=0,  # Ctrl-C is for the one that asks
                )
        return super().start(command, fds)

    @contextmanager
    def spawning(self) -> Iterator[None]:
        """Have this process's own children of the method `spawn` be of the zygote."""
        util.spawnv_passfds = self.spawnv_passfds
        try:
            yield
        finally:
            util.spawnv_passfds = _EXEC

    def fits(self, environ: Mapping[str, str]) -> bool:
        """Whether libraries would not read other variables than they did."""
        early = [
            {name: value for name, value in found.items() if name.startswith(_READ_EARLY)}
            for found in (environ, self.environ)
        ]
        return early[0] == early[1]


class Forked:
    """What `ProcessGroup` asks of `subprocess.Popen`, for a process of a zygote's."""

    def __init__(
        self, zygote: Zygote, argv: Sequence[str], environ: Mapping[str, str], output: int
    ) -> None:
        self.returncode: int | None = None
        command = Command(
            argv=argv, environ=environ, directory=os.getcwd(), fds=(0, 1, 2), leads=True
        )
        with open(os.devnull) as nothing:
            self.pid = zygote.start(command, [nothing.fileno(), output, output])
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None and timeout is not None:
            with open(os.pidfd_open(self.pid), "rb") as ended:
                if not select.select([ended], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout)
        status = self._wait(0)
        assert status is not None
        return status

    def _wait(self, options: int) -> int | None:
        with self._lock:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, options)
                except ChildProcessError:  # psutil took it; subprocess.Popen says 0 then, too
                    pid, status = self.pid, 0
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode


def main() -> None:
    """Run the zygote, and after a fork the command: the only end of this function."""
    before = dict(os.environ)
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"imports began {len(threads) - 1} threads, which no fork has"
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.enable()
    gc.collect()
    gc.freeze()  # shared for good, and nothing for the collector to look through
    setproctitle.getproctitle()  # it looks for the command line now, beside the first environment
    sys.stdout.flush()
    _serve(socket.socket(fileno=int(sys.argv[1])), added).run()


def _serve(end: socket.socket, added: Mapping[str, str]) -> Command:
    """Fork for whoever asks; returns in each new process, and never in this one.

    `added` are variables that the imports set.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        message, fds, _, _ = socket.recv_fds(end, _LARGEST_MESSAGE, _MOST_FDS)
        if not message:
            os._exit(0)
        command: Command = pickle.loads(message)
        told, tell = os.pipe()
        middle = os.fork()
        if not middle:
            # Its parent ends at once, so that it comes to the next one above that adopts.
            child = os.fork()
            if child:
                if command.leads:
                    os.setpgid(child, child)
                os.write(tell, b"%d" % child)
                os._exit(0)
            end.close()
            return _become(command, fds, added)
        os.close(tell)
        with open(told, "rb") as pipe:
            answer = pipe.read(20)
        os.waitpid(middle, 0)
        for fd in fds:
            os.close(fd)
        end.send(answer)


def _become(command: Command, fds: Sequence[int], added: Mapping[str, str]) -> Command:
    """Turn this new process into what the command asks for, with a stem of its own."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in fds]
    for fd, number in zip(high, command.fds, strict=True):
        os.dup2(fd, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in command.fds:
            with suppress(OSError):  # that of the listing
                os.close(int(name))
    os.chdir(command.directory)
    os.environ.clear()
    os.environ.update({**added, **command.environ})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        end, other = (
            fcntl.fcntl(s.fileno(), fcntl.F_DUPFD_CLOEXEC, _ABOVE) for s in (ours, theirs)
        )
    if not os.fork():
        os.closerange(3, other)  # with its own end, the lower one
        return _serve(socket.socket(fileno=other), added)
    os.close(other)
    util.spawnv_passfds = Stem(socket.socket(fileno=end)).spawnv_passfds
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _read_again()
    return command


def _read_again() -> None:
    """Have modules read the variables that they read as they were imported."""
    values, logger = sys.modules["prometheus_client.values"], sys.modules["vllm.logger"]
    values.ValueClass = values.get_value_class()  # type: ignore[attr-defined]
    logger._configure_vllm_root_logger()  # type: ignore[attr-defined]


def _adopt(whether: bool) -> None:
    """Become the parent of processes below whose own parent ends, or no longer."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl: PR_SET_CHILD_SUBREAPER")
