"""The kernels of kept tokens against the definition: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.fold_cases import Case
from tests.kernels.keep_cases import LARGE, check

ROOT = Path(__file__).parents[2]


def test_against_definition() -> None:
    # In a process of its own: the interpreter is chosen when Triton is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.keep_cases"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_gpu(case: Case) -> None:
    check(case, "cuda")
