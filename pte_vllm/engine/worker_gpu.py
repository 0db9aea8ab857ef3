"""The worker on a GPU; `worker_cpu.py` has the other.

They are apart because vLLM's CPU worker puts stand-ins for streams, events and pinned memory into
torch when it is imported.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from pte_vllm.engine.queries import QueriesMixin

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes


class PTEGPUWorker(QueriesMixin, Worker):
    """vLLM's worker on a GPU with our runner."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            from pte_vllm.engine.runner_v2 import PTEGPUModelRunnerV2

            logger.warning("PTE on Model Runner V2 has not been seen to work on a GPU yet")
            return PTEGPUModelRunnerV2(self.vllm_config, self.device)
        from pte_vllm.engine.runner_v1 import PTEGPUModelRunner

        # By the `setdefault` in serve.py, until V2 has been seen to work on a GPU.
        logger.info("PTE on Model Runner V1; VLLM_USE_V2_MODEL_RUNNER=1 chooses V2")
        return PTEGPUModelRunner(self.vllm_config, self.device)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        if not kv_cache_config.needs_kv_cache_zeroing:  # else the parent has done it
            self.model_runner._init_kv_zero_meta()

    def compile_or_warm_up_model(self) -> Any:
        if not self.use_v2_model_runner:
            return super().compile_or_warm_up_model()
        with self.model_runner.pte_warm_up():
            return super().compile_or_warm_up_model()
