"""The worker on a CPU."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.logger import init_logger
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from pte_vllm.engine import huge_pages
from pte_vllm.engine.queries import QueriesMixin
from pte_vllm.engine.waiting import sleep_while_waiting
from pte_vllm.kernels import native

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Let `module.name` be `value` inside the block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def compile_with_lora(config: VllmConfig) -> None:
    """Put torch.compile back, which vLLM's CPU platform prepares, and drops again for LoRA.

    Our LoRA is an operator that it need not look into (`lora/operators.py`). Who asked for eager
    keeps it.
    """
    compilation = config.compilation_config
    prepared = "cpp.dynamic_threads" in compilation.inductor_compile_config
    if config.lora_config is None or not prepared:
        return
    if reason := _why_eager(config):
        logger.warning("No torch.compile with LoRA: %s", reason)
        return
    compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE


def _why_eager(config: VllmConfig) -> str | None:
    if config.use_v2_model_runner:
        return "it has not been tried on Model Runner V2"
    if config.model_config.is_moe:
        return "it has not been tried on mixtures of experts"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing (apt install python3-dev)"
    try:
        native.load()
    except native.NativeError as error:
        return str(error)
    return None


class PTECPUWorker(QueriesMixin, CPUWorker):
    """vLLM's worker on a CPU with our runner, torch.compile and huge pages."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        sleep_while_waiting()
        compile_with_lora(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        # The parent takes the class from a module when it builds the runner.
        if self.use_v2_model_runner:
            from vllm.v1.worker.cpu import model_runner

            from pte_vllm.engine.runner_v2 import PTECPUModelRunnerV2

            replaced = _replaced(model_runner, "CPUModelRunner", PTECPUModelRunnerV2)
        else:
            from pte_vllm.engine.runner_v1 import PTECPUModelRunner

            replaced = _replaced(cpu_worker, "CPUModelRunner", PTECPUModelRunner)
        with replaced:
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        huge_pages.collapse()  # weights and KV cache are there, adapters not yet
        return times
