"""What one process of `pte-vllm bench gpu` measures, and the engine that it builds for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HEADROOM_TOKENS = 1024
"""That a sequence under full attention may grow while it is prepared and measured."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one child process does."""

    part: str
    """kernels, parity, throughput or profile."""
    name: str = ""
    model: str = ""
    adapter: str | None = None
    window_tokens: int | None = None
    """None: vLLM as it is, with full attention."""
    rollouts: list[int] = field(default_factory=list)
    """Tokens of a finished rollout; full attention holds sequences of all lengths up to it."""
    prompt_tokens: int = 64
    seconds: float = 20.0
    dtype: str = "bfloat16"
    rank: int = 32
    rule: str = "ridge"
    max_num_seqs: int = 512
    memory_utilization: float = 0.9
    attention_backend: str | None = None
    """Of baselines; None: vLLM's choice."""
    scratch: str = ""
    dry_run: bool = False

    @property
    def block_size(self) -> int:
        return 32 if self.dry_run else 16  # what a CPU's kernels want; vLLM's default on CUDA


def build(spec: Spec, *, load_format: str = "dummy", **more: Any) -> tuple[Any, Any]:
    """An engine and its LoRA request; nothing is fetched and there is no tokenizer."""
    from vllm import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    from pte_vllm.method.options import EngineConfig
    from pte_vllm.serve import engine_args

    args: dict[str, Any] = {
        "model": spec.model,
        "skip_tokenizer_init": True,
        "load_format": load_format,
        "dtype": spec.dtype,
        "block_size": spec.block_size,
        "max_model_len": max(spec.rollouts) + spec.prompt_tokens + 2 * HEADROOM_TOKENS,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": 8192,
        "disable_log_stats": True,
        "generation_config": "vllm",
    }
    if spec.dry_run:
        args |= {"num_gpu_blocks_override": 400, "kv_cache_memory_bytes": 2**28}
        args |= {"enforce_eager": True}
    else:
        args["gpu_memory_utilization"] = spec.memory_utilization
        args["cudagraph_capture_sizes"] = capture_sizes(spec.max_num_seqs)
    if spec.window_tokens is not None:
        args |= engine_args(EngineConfig(window_tokens=spec.window_tokens))
    elif spec.attention_backend is not None:
        args["attention_backend"] = spec.attention_backend
    lora = None
    if spec.adapter is not None:
        args |= {"enable_lora": True, "max_lora_rank": max(8, spec.rank), "max_loras": 1}
        lora = LoRARequest(lora_name="bench", lora_int_id=1, lora_path=spec.adapter)
    return LLMEngine.from_engine_args(EngineArgs(**(args | more))), lora


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes with CUDA graphs, up to `max_num_seqs`, a multiple of 8.

    vLLM's own stop at 512: steps of more sequences would run without graphs.
    """
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < max_num_seqs]
    return [*sizes, *range(96, max_num_seqs, 32), max_num_seqs]
