"""Where the time of a step goes on a CPU: clocks around functions of vLLM's and ours."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

REST = "all else"


class Parts:
    """Time spent in each part, without what it spends in another; one thread only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]  # of each call that is under way, the time of calls inside it

    def time(self, owner: type, method: str, part: str) -> None:
        """Count calls of `owner.method` as that part from now on."""
        function: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.seconds[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, method, timed)


def time_engine() -> Parts:
    """Clocks for engines that this process builds after it."""
    from vllm.lora.layers import LogitsProcessorWithLoRA
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.sample.sampler import Sampler

    from pte_vllm.engine.lora.cpu import CPULayerPunica
    from pte_vllm.engine.runner_v1 import PTECPUModelRunner

    parts = Parts()
    for owner, method, part in (
        (PTECPUModelRunner, "_model_forward", "model: linears, norms, activations"),
        (CPUAttentionBackendImpl, "forward", "attention"),
        (CPUAttentionBackendImpl, "do_kv_cache_update", "keys and values into the cache"),
        (CPULayerPunica, "add", "LoRA and states"),
        (PTECPUModelRunner, "_fold_due", "folds"),
        (PTECPUModelRunner, "_publish", "gaps and slots of the step"),
        (LogitsProcessor, "forward", "output layer"),
        (LogitsProcessorWithLoRA, "forward", "output layer"),
        (Sampler, "forward", "sampling"),
        (Scheduler, "schedule", "scheduler"),
        (Scheduler, "update_from_output", "scheduler"),
    ):
        parts.time(owner, method, part)
    return parts
