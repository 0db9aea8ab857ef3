"""Worker on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from pte_vllm.worker import PTEWorkerMixin


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """`module.name` is `value` inside the block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class PTECPUWorker(PTEWorkerMixin, CPUWorker):
    """On a CPU."""

    def init_device(self) -> None:
        # The parent takes the class from a module when it builds the runner.
        if self.use_v2_model_runner:
            from vllm.v1.worker.cpu import model_runner

            from pte_vllm.runner_v2 import PTECPUModelRunnerV2

            replaced = _replaced(model_runner, "CPUModelRunner", PTECPUModelRunnerV2)
        else:
            from pte_vllm.runner import PTECPUModelRunner

            replaced = _replaced(cpu_worker, "CPUModelRunner", PTECPUModelRunner)
        with replaced:
            super().init_device()
