"""Workers that build our model runner in place of vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vllm.v1.worker import cpu_worker, gpu_model_runner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from pte_vllm.runner import PTECPUModelRunner, PTEGPUModelRunner


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """`module.name` is `value` inside the block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class PTEWorkerMixin:
    """Methods reached with `collective_rpc`."""

    def pte_requests(self) -> dict[str, Any]:
        return self.model_runner.pte_requests()

    def pte_counters(self) -> dict[str, Any]:
        return self.model_runner.pte_counters()

    def pte_check_integrity(self) -> dict[str, int]:
        return self.model_runner.pte_check_integrity()

    def pte_thoughts(self, name: str) -> dict[str, Any] | None:
        return self.model_runner.pte_thoughts(name)

    def pte_thoughts_file(self, name: str) -> tuple[bool, bytes | None]:
        return self.model_runner.pte_thoughts_file(name)

    def pte_thoughts_forget(self, name: str) -> str | None:
        return self.model_runner.pte_thoughts_forget(name)

    def pte_fold_events(self, name: str, since: int) -> dict[str, Any] | None:
        return self.model_runner.pte_fold_events(name, since)

    def pte_rho(self, name: str) -> list[float] | None:
        return self.model_runner.pte_rho(name)


class PTECPUWorker(PTEWorkerMixin, CPUWorker):
    """On CPU."""

    def init_device(self) -> None:
        with _replaced(cpu_worker, "CPUModelRunner", PTECPUModelRunner):
            super().init_device()


class PTEGPUWorker(PTEWorkerMixin, Worker):
    """On CUDA."""

    def init_device(self) -> None:
        # The parent imports the class from its module when it builds the runner.
        with _replaced(gpu_model_runner, "GPUModelRunner", PTEGPUModelRunner):
            super().init_device()
