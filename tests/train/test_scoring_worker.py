"""The worker behind rewards, given code to run: what it is kept from, and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pte_vllm.train.rewards.scoring_worker import ScoringWorker
from tests.train.evaluator import evaluator, sleeper


@pytest.fixture(scope="module")
def worker() -> Iterator[ScoringWorker]:
    worker = ScoringWorker(evaluator, timeout_s=60.0)
    yield worker
    worker.close()


def run(worker: ScoringWorker, code: str) -> float:
    return worker.score((), (code,))


def gone(pid: int, *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_scores_are_numbers_from_0_to_1(worker: ScoringWorker) -> None:
    values = ("0.25", "7", "-3", "float('nan')", "float('inf')", "None", "'x'", "True")
    assert [run(worker, code) for code in values] == [0.25, 1, 0, 0, 0, 0, 0, 1]


def test_one_process_scores_all(worker: ScoringWorker) -> None:
    run(worker, "1")
    pid = worker.pid
    assert [run(worker, "__import__('os').getpid()") for _ in range(3)] == [1.0] * 3
    assert worker.pid == pid is not None


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.system('touch made')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os._exit(0) if os.fork() == 0 else None",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import multiprocessing as m; p = m.Process(target=int); p.start(); p.join()",
        "import os; os.kill(os.getppid(), 0)",
        "f = open('made', 'w')",
        "f = open('kept', 'a')",
        "f = open('kept', 'r+')",
        "import os; os.open('made', os.O_CREAT)",
        "import pathlib; pathlib.Path('made').write_text('x')",
        "import sqlite3; sqlite3.connect('made').execute('create table t (x)')",
        "import tempfile; tempfile.TemporaryFile()",
        "import tempfile; tempfile.mkdtemp()",
        "import shutil; shutil.copyfile('kept', 'made')",
        "import os; os.remove('kept')",
        "import os; os.rename('kept', 'made')",
        "import os; os.link('kept', 'made')",
        "import os; os.symlink('kept', 'made')",
        "import os; os.truncate('kept', 0)",
        "import os; os.chmod('kept', 0o600)",
        "import os; os.utime('kept')",
        "import os; os.mkdir('made')",
        "import os; os.rmdir('empty')",
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import ctypes; ctypes.CDLL(None).getpid()",
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))",
    ],
)
def test_what_no_scorer_needs_is_refused(worker: ScoringWorker, tmp_path: Path, code: str) -> None:
    (tmp_path / "kept").write_text("text")
    (tmp_path / "kept").chmod(0o640)
    (tmp_path / "empty").mkdir()
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    for name in ("kept", "made", "empty"):
        code = code.replace(f"'{name}'", repr(str(tmp_path / name)))
    code = code.replace("touch made", f"touch {tmp_path / 'made'}")
    assert run(worker, "1") == 1.0
    pid = worker.pid
    assert run(worker, code) == 0.0
    assert run(worker, "1") == 1.0
    assert worker.pid == pid
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(tmp_path.iterdir())] == before
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "code",
    [
        "import wave, sympy.physics.units",  # not imported yet
        f"assert open({__file__!r}).read(3)",
        f"import os; assert os.listdir({str(Path(__file__).parent)!r})",
        f"import glob; assert glob.glob({str(Path(__file__).parent)!r} + '/*')",
        "import numpy; assert numpy.linalg.norm(numpy.ones((200, 200)) @ numpy.ones((200, 9)))",
    ],
)
def test_imports_and_reads_stay(worker: ScoringWorker, code: str) -> None:
    assert run(worker, code) == 1.0


def test_the_worker_has_limits_and_neither_secrets_nor_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "https_proxy", "PTE_ADMIN_KEY"):
        monkeypatch.setenv(name, "secret")
    worker = ScoringWorker(evaluator, timeout_s=60.0)
    try:
        assert run(worker, "'secret' not in __import__('os').environ.values()") == 1.0
        for place in ("os.environ['HOME']", "os.getcwd()"):
            assert run(worker, f"import os; assert os.listdir({place}) == []") == 1.0
        for name, value in (("AS", 2**31), ("CORE", 0), ("FSIZE", 0)):
            limit = f"resource.getrlimit(resource.RLIMIT_{name})"
            assert run(worker, f"import resource; assert {limit} == ({value}, {value})") == 1.0
    finally:
        worker.close()


@pytest.mark.parametrize(
    "code",
    [
        "exit()",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "raise MemoryError",
        "b'x' * 2**32",
        "def f(): f()\nf()",
        "print('1.0')\nraise ValueError",
        "import sys; sys.stdin.close(); sys.stdout.close(); sys.stderr.close(); raise OSError",
        "import os; os.abort()",
        "import os; os._exit(0)",
    ],
)
def test_what_ends_a_process_earns_0(worker: ScoringWorker, code: str) -> None:
    assert run(worker, code) == 0.0
    assert run(worker, "0.5") == 0.5


@pytest.mark.parametrize("code", ["9**9**9**9", "while True: pass", "import time; time.sleep(99)"])
def test_what_never_ends_is_killed(code: str) -> None:
    worker = ScoringWorker(evaluator, timeout_s=60.0)
    try:
        run(worker, "1")
        pid, worker.timeout_s = worker.pid, 1.0
        start = time.monotonic()
        assert run(worker, code) == 0.0
        assert time.monotonic() - start < 30
        assert pid is not None and gone(pid, within_s=0.5)
        worker.timeout_s = 60.0
        assert run(worker, "0.5") == 0.5
    finally:
        worker.close()


def test_a_slow_machine_is_no_fault_of_the_answer() -> None:
    """Time that passes while the worker does not compute, as on a busy machine, is not counted."""
    worker = ScoringWorker(sleeper, timeout_s=0.5)
    try:
        assert worker.score((), (1.5,)) == 1.0
    finally:
        worker.close()


def test_a_worker_killed_from_outside_is_started_again(worker: ScoringWorker) -> None:
    for _ in range(3):
        assert run(worker, "0.5") == 0.5
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)  # may not have died when the next request comes


def test_a_scorer_that_cannot_be_made_is_an_error(worker: ScoringWorker) -> None:
    with pytest.raises(OSError, match=r"ValueError\('no such task:\\n'"):
        worker.score(("no such task:\n",), ("1",))
    assert run(worker, "0.5") == 0.5


def test_threads_take_turns() -> None:
    worker = ScoringWorker(evaluator, timeout_s=60.0)
    results: dict[int, float] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            results[number] = run(worker, f"{number} / 8")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert results == {number: number / 8 for number in range(8)}


def test_closing_ends_the_worker_and_removes_its_directory() -> None:
    worker = ScoringWorker(sleeper, timeout_s=60.0)
    assert worker.pid is None
    assert worker.score((), (0.0,)) == 1.0
    pid = worker.pid
    assert pid is not None
    home = Path(psutil.Process(pid).cwd())
    assert home.is_dir()
    worker.close()
    assert gone(pid, within_s=0.5) and not home.exists()


def test_the_worker_ends_with_its_trainer() -> None:
    code = """
from pte_vllm.train.rewards.scoring_worker import ScoringWorker
from tests.train.evaluator import sleeper
worker = ScoringWorker(sleeper)
worker.score((), (0.0,))
print(worker.pid, worker._running.home.name)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    pid, home = done.stdout.decode().split()
    assert gone(int(pid), within_s=0.5) and not Path(home).exists()


def test_a_busy_worker_ends_when_its_trainer_is_gone(tmp_path: Path) -> None:
    code = """
import threading
from pte_vllm.train.rewards.scoring_worker import ScoringWorker
from tests.train.evaluator import sleeper
worker = ScoringWorker(sleeper, timeout_s=1.0)
worker.score((), (0.0,))
threading.Timer(0.2, lambda: print(worker.pid, flush=True)).start()
worker.score((), (100.0,))
"""
    env = os.environ | {"TMPDIR": str(tmp_path)}  # a killed trainer leaves the worker's directory
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert psutil.pid_exists(pid)
    assert gone(pid, within_s=30)
