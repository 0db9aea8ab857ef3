"""Model Runner V2: what each choice of runner needs, and PTE on it, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pte_vllm.method.options import EngineConfig
from pte_vllm.serve import engine_args

ROOT = Path(__file__).parents[2]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a vLLM for CUDA interprets nothing")


def _under_interpreter(*paths: str, timeout_s: int) -> str:
    """Run test files with V2 in a process of their own; returns what they printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.harness.triton_interpreter", "-q", "-s"]
        + ["-p", "no:cacheprovider", f"--timeout={timeout_s}", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@no_gpu
def test_driven_for_real() -> None:
    printed = _under_interpreter("tests/engine/model_runner_v2.py", timeout_s=600)
    assert "folds, max |Δ log p|" in printed
    print("\n".join(line for line in printed.splitlines() if "Δ log p" in line))


@no_gpu
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "path",
    [
        "tests/parity/test_schedules.py",
        "tests/engine/test_blocks.py",
        "tests/engine/test_resume.py",
        "tests/engine/test_thoughts.py",
        "tests/engine/test_keep.py",
        "tests/engine/test_keep_fork.py",
        "tests/engine/test_keep_pool.py",
        "tests/parity/test_keep.py",
    ],
)
def test_tests_of_the_engine(path: str) -> None:
    """What holds on V1 holds on V2."""
    _under_interpreter(path, timeout_s=7200)


def test_v1_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    engine_args(EngineConfig())
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    engine_args(EngineConfig())
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"


_IMPORTS = """
import torch

def of_torch():
    names = ("Stream", "Event", "current_stream", "stream")  # vLLM wraps set_stream itself
    return [torch.Event, torch.Tensor.pin_memory, torch.Tensor.record_stream,
            torch.accelerator.synchronize, *(getattr(torch.cuda, name) for name in names)]

before = of_torch()
import pte_vllm.engine.attention, pte_vllm.engine.lora.manager, pte_vllm.plugin
import pte_vllm.engine.runner_v1, pte_vllm.engine.runner_v2
import pte_vllm.engine.scheduler, pte_vllm.engine.worker_gpu
pte_vllm.plugin.register()
assert of_torch() == before
import pte_vllm.engine.worker_cpu
assert of_torch() != before  # else the first assertion shows nothing
print("ok")
"""


@no_gpu
def test_cuda_worker_keeps_streams() -> None:
    """vLLM's CPU worker replaces streams, events and pinned memory by stand-ins when imported."""
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True)
    assert done.stdout.strip().endswith("ok"), done.stderr[-2000:]
