"""Engines under measurement on a GPU, each in a process of its own: throughput, profile, parity.

`python -m pte_vllm.bench.gpu.engine SPEC` prints one line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
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


class Batch:
    """Sequences that all decode, spread over the stages that rollouts are at in a steady state.

    Under full attention a sequence's cost grows with its length: lengths are spread evenly over
    `[prompt, prompt + rollout - HEADROOM_TOKENS)`. With a window it only depends on where the
    sequence stands between two folds, whatever its position: lengths are spread evenly over one
    stride after the first fold.
    """

    def __init__(self, engine: Any, lora: Any, spec: Spec, rollout_tokens: int) -> None:
        self.engine = engine
        blocks = engine.vllm_config.cache_config.num_gpu_blocks - 1  # vLLM's null block
        size, prompt = spec.block_size, spec.prompt_tokens
        if spec.window_tokens is None:
            spread = max(size, rollout_tokens - HEADROOM_TOKENS)
            start, extra = prompt, {}
            held = (prompt + spread / 2 + HEADROOM_TOKENS) / size
        else:
            from pte_vllm.method.options import EngineConfig

            config = EngineConfig(window_tokens=spec.window_tokens)
            plan = config.plan(pin_tokens=prompt, block_size=size)
            start, spread, extra = plan.first_fold, plan.stride, {"pte_pin_tokens": prompt}
            held = plan.pinned_blocks + plan.window_blocks + 1
        self.pool_tokens = blocks * size
        self.num_seqs = max(1, min(spec.max_num_seqs, int(blocks / held)))
        self._ids = [f"{rollout_tokens}-{i}" for i in range(self.num_seqs)]
        self.lengths = [int(start + i * spread / self.num_seqs) for i in range(self.num_seqs)]
        self._add(lora, extra)

    def _add(self, lora: Any, extra: dict[str, int]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rng, vocabulary = random.Random(0), self.engine.model_config.get_vocab_size()
        for request_id, length in zip(self._ids, self.lengths, strict=True):
            params = SamplingParams(
                max_tokens=self.engine.model_config.max_model_len - length - 1,
                temperature=1.0,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
                output_kind=RequestOutputKind.DELTA,
            )
            tokens = [rng.randrange(2, vocabulary) for _ in range(length)]
            self.engine.add_request(
                request_id, {"prompt_token_ids": tokens}, params, lora_request=lora
            )

    def start(self) -> float:
        """Prefill until every sequence decodes; seconds."""
        began = time.perf_counter()
        seen: set[str] = set()
        while len(seen) < self.num_seqs and self.engine.has_unfinished_requests():
            seen |= {output.request_id for output in self.engine.step()}
        return time.perf_counter() - began

    def run(self, seconds: float) -> dict[str, float]:
        """Decode for a while."""
        tokens, step_ms, began = 0, [], time.perf_counter()
        last = began
        while (now := time.perf_counter()) < began + seconds:
            outputs = self.engine.step()
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            last = time.perf_counter()
            step_ms.append((last - now) * 1e3)
        return {
            "tokens_per_second": tokens / (last - began),
            "sequences_per_step": tokens / len(step_ms),
            "step_ms": statistics.median(step_ms),
            "steps": len(step_ms),
        }

    def stop(self) -> None:
        self.engine.abort_request(self._ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def throughput(spec: Spec) -> dict[str, Any]:
    """Tokens per second in a steady state, for each rollout length (a window: for all at once)."""
    began = time.perf_counter()
    engine, lora = build(spec)
    started_s, runs = time.perf_counter() - began, []
    for rollout in spec.rollouts if spec.window_tokens is None else spec.rollouts[-1:]:
        batch = Batch(engine, lora, spec, rollout)
        prepared_s = batch.start()
        runs.append(
            {
                "rollout_tokens": rollout if spec.window_tokens is None else None,
                "sequences": batch.num_seqs,
                "pool_tokens": batch.pool_tokens,
                "first_lengths": [batch.lengths[0], batch.lengths[-1]],
                "prepared_s": prepared_s,
                **batch.run(spec.seconds),
            }
        )
        batch.stop()
    return {"window_tokens": spec.window_tokens, "started_s": started_s, "runs": runs}


def profile(spec: Spec) -> dict[str, Any]:
    """Which share of a step folds and modulation take, by the device's own clock."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    engine, lora = build(spec)
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for owner, name in ((runner.pte_evicted, "fold_into"), (runner, "_publish")):
        original = getattr(owner, name)

        def labelled(*args: Any, _call: Any = original, _name: str = name, **kwargs: Any) -> Any:
            with record_function(f"pte {_name}"):
                return _call(*args, **kwargs)

        setattr(owner, name, labelled)
    batch = Batch(engine, lora, spec, spec.rollouts[-1])
    batch.start()
    plain = batch.run(spec.seconds / 2)  # the profiler slows the host down
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        profiled = batch.run(min(spec.seconds / 2, 4.0))
        if on_gpu:
            torch.cuda.synchronize()
    events = {event.key: event for event in recorded.key_averages()}
    steps = profiled["steps"]

    def device_ms(name: str, *, own: bool) -> float:
        event = events.get(name)
        if event is None:
            return 0.0
        us = event.self_device_time_total if own else event.device_time_total
        return float(us) / 1e3 / steps

    def host_ms(name: str) -> float:
        return float(events[name].cpu_time_total) / 1e3 / steps if name in events else 0.0

    fold, modulate = device_ms("pte fold_into", own=False), device_ms("_modulate_kernel", own=True)
    top = sorted(events.values(), key=lambda event: -event.self_device_time_total)[:25]
    return {
        "sequences": batch.num_seqs,
        "step_ms": plain["step_ms"],
        "profiled_step_ms": profiled["step_ms"],
        "fold_device_ms": fold,
        "fold_kernel_ms": device_ms("_moments_kernel", own=True),
        "modulate_device_ms": modulate,
        "fold_host_ms": host_ms("pte fold_into"),
        "publish_host_ms": host_ms("pte _publish"),
        "share": (fold + modulate) / plain["step_ms"],
        "longest": {event.key: event.self_device_time_total / 1e3 / steps for event in top},
    }


def main() -> None:
    """Do what the SPEC on the command line says."""
    answers, sys.stdout = sys.stdout, sys.stderr
    spec = Spec(**json.loads(sys.argv[1]))
    # The kernels' part needs no engine; of the others only throughput leaves it its own process.
    own_process = spec.part == "throughput" and not spec.dry_run
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    if spec.dry_run:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if spec.part == "parity":  # Triton's attention would multiply fp32 as TF32
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    for name, value in (
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_USE_FLASHINFER_SAMPLER", "0"),  # it is compiled at first use, from the network
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(name, value)
    result: Any
    if spec.part == "kernels":
        from pte_vllm.bench.gpu.kernels import run

        result = run(dry_run=spec.dry_run)
    elif spec.part == "parity":
        from pte_vllm.bench.gpu.parity import parity

        result = parity(spec)
    else:
        result = {"throughput": throughput, "profile": profile}[spec.part](spec)
    from pte_vllm.bench.report import machine

    print(json.dumps({"machine": machine(), "result": result}), file=answers, flush=True)


if __name__ == "__main__":
    main()
