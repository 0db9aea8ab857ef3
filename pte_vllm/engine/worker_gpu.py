"""Worker on CUDA, and what both workers answer; `worker_cpu.py` has the other.

They are apart because vLLM's CPU worker puts stand-ins for streams, events and pinned memory into
torch when it is imported.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes


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


class PTEGPUWorker(PTEWorkerMixin, Worker):
    """On CUDA."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            from pte_vllm.engine.runner_v2 import PTEGPUModelRunnerV2

            logger.warning("PTE on Model Runner V2 has not been seen to work on a GPU yet")
            return PTEGPUModelRunnerV2(self.vllm_config, self.device)
        from pte_vllm.engine.runner_v1 import PTEGPUModelRunner

        # By the `setdefault` in serve.py, until V2 has been seen to work on a GPU.
        logger.info("PTE on Model Runner V1; VLLM_USE_V2_MODEL_RUNNER=1 chooses V2")
        return PTEGPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        if not self.use_v2_model_runner:
            return super().compile_or_warm_up_model()
        with self.model_runner.pte_warm_up():
            return super().compile_or_warm_up_model()
