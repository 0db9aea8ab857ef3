"""Workers of an experiment end with it, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, time
from pte_vllm.train.experiments.workers import workers
with workers(1) as (pool, _):
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # nobody may have waited for it yet
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_workers_end_with_the_experiment(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert _runs(worker)
        getattr(process, how)()
    while _runs(worker):  # the test's own time limit ends it otherwise
        time.sleep(0.05)
