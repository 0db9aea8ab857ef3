"""What PTE does not support yet, refused at start with the flag that asked for it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from pte_vllm.method.options import EngineConfig

_ROUTER = "servers that balance outside share no adapters: run servers of their own behind a router"

_REASONS = {
    "--speculative-config": "drafts come from n-grams, or from a head whose layers share the "
    "model's blocks: name the method, ngram, eagle, eagle3 or mtp",
    "--async-scheduling": "with --speculative-config a step is planned before it is known which "
    "drafts the one before accepted",
    "--pipeline-parallel-size": "states, and what was kept, would lie in parts on several stages, "
    "and nobody puts them together yet",
    "--data-parallel-size": "engines of a mixture of experts wait for each other in every step, "
    "which has not been tried with folds",
    "--data-parallel-rank": _ROUTER,
    "--data-parallel-external-lb": _ROUTER,
    "--data-parallel-hybrid-lb": _ROUTER,
    "--data-parallel-multi-port-external-lb": _ROUTER,
    "--decode-context-parallel-size": "decode context parallelism splits a sequence",
    "--prefill-context-parallel-size": "prefill context parallelism splits a sequence",
    "--kv-transfer-config": "KV connectors move blocks without the thought state",
    "--kv-cache-dtype": "of the quantised KV caches only those are read whose numbers are single "
    "bytes under one scale of the layer: fp8, fp8_e4m3, fp8_e5m2; use one of them, or auto",
    "--kv-cache-dtype-skip-layers": "blocks of 8-bit and of other layers differ in size",
    "--fully-sharded-loras": "the thought state needs A's whole output on every rank",
    "--weight-transfer-config": "the base model of a server does not change; push adapters with "
    "PUT /pte/v1/adapters/{name}, or have them loaded from a directory with POST "
    "/v1/load_lora_adapter",
    "VLLM_USE_V2_MODEL_RUNNER": "heads that draft were tried with Model Runner V1 only",
    "VLLM_LORA_ENABLE_DUAL_STREAM": "ranks add up A x, and two streams would mix up their sums",
    "--enable-dbo": "dual-batch overlap splits a step that has one set of gaps",
}

PARTLY = {
    "--speculative-config": "ngram, eagle, eagle3 and mtp",
    "--data-parallel-size": "not for mixtures of experts",
    "--async-scheduling": "not with drafts",
    "--kv-cache-dtype": "fp8, fp8_e4m3 and fp8_e5m2 with one scale for a layer; vLLM's own kernels "
    "for them were not run",
}
"""What works, and its bounds."""

HEADS = ("eagle", "eagle3", "mtp")
"""Methods of --speculative-config whose drafts come from a head over the model's hidden states."""
SUPPORTED_DRAFTS = ("ngram", *HEADS)
"""Methods of --speculative-config that folds go with."""

_PLAIN_CACHES = ("auto", "bfloat16", "float16", "float32", "half")
FLOAT8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Values of --kv-cache-dtype that quantise each number by itself."""

CPU_BLOCK_SIZE = 128
"""Of vLLM on a CPU, where --block-size is not given."""


class UnsupportedError(ValueError):
    """A combination that PTE refuses; the message names the flag, the value and the reason."""


def _refuse(used: dict[str, object]) -> None:
    for flag, value in used.items():
        if value:
            raise UnsupportedError(f"{flag} {value} is not supported with PTE: {_REASONS[flag]}")


def _more_than_one(value: Any) -> int:
    return value if isinstance(value, int) and value > 1 else 0


def _given(args: Namespace, name: str) -> str:
    """Return a flag's value in words; empty where it was not given."""
    value = getattr(args, name, None)
    return "" if value is None or value is False else str(value)


def check_serve_args(args: Namespace, engine: EngineConfig) -> None:
    """Refuse what the command line alone shows, before anything is loaded.

    Raises:
        UnsupportedError: If a flag is not supported; the message names it.
    """
    _refuse(
        {
            "--speculative-config": _draft_method(getattr(args, "speculative_config", None)),
            "--pipeline-parallel-size": _more_than_one(args.pipeline_parallel_size),
            "--data-parallel-rank": _given(args, "data_parallel_rank"),
            "--data-parallel-external-lb": _given(args, "data_parallel_external_lb"),
            "--data-parallel-hybrid-lb": _given(args, "data_parallel_hybrid_lb"),
            "--data-parallel-multi-port-external-lb": _given(
                args, "data_parallel_multi_port_external_lb"
            ),
            "--decode-context-parallel-size": _more_than_one(args.decode_context_parallel_size),
            "--prefill-context-parallel-size": _more_than_one(args.prefill_context_parallel_size),
            "--kv-transfer-config": getattr(args, "kv_transfer_config", None),
            "--kv-cache-dtype": _unreadable(args.kv_cache_dtype),
            "--kv-cache-dtype-skip-layers": _skipped(
                args.kv_cache_dtype, getattr(args, "kv_cache_dtype_skip_layers", None)
            ),
            "--fully-sharded-loras": getattr(args, "fully_sharded_loras", False),
            "--enable-dbo": getattr(args, "enable_dbo", False),
            "--weight-transfer-config": _backend(getattr(args, "weight_transfer_config", None)),
        }
    )
    block_size = args.block_size or _default_block_size()
    if block_size is not None:
        check_block_size(block_size)
        check_cpu_cache(args.kv_cache_dtype, block_size)
        check_window(engine, block_size)


def check_vllm_config(vllm_config: Any, engine: EngineConfig) -> None:
    """Refuse what the resolved configuration shows; this runs in every worker.

    Raises:
        UnsupportedError: If an option is not supported; the message names the flag.
    """
    from vllm import envs

    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    _refuse(
        {
            "--speculative-config": _draft_method(vllm_config.speculative_config),
            "--async-scheduling": vllm_config.speculative_config is not None
            and vllm_config.scheduler_config.async_scheduling,
            "--pipeline-parallel-size": _more_than_one(parallel.pipeline_parallel_size),
            "--data-parallel-size": _more_than_one(parallel.data_parallel_size)
            if vllm_config.model_config.is_moe
            else 0,
            "--decode-context-parallel-size": _more_than_one(parallel.decode_context_parallel_size),
            "--prefill-context-parallel-size": _more_than_one(
                parallel.prefill_context_parallel_size
            ),
            "--kv-transfer-config": vllm_config.kv_transfer_config,
            "--kv-cache-dtype": _unreadable(vllm_config.cache_config.cache_dtype),
            "--kv-cache-dtype-skip-layers": _skipped(
                vllm_config.cache_config.cache_dtype,
                vllm_config.cache_config.kv_cache_dtype_skip_layers,
            ),
            "--fully-sharded-loras": lora.fully_sharded_loras if lora is not None else False,
            "--enable-dbo": parallel.enable_dbo,
            "VLLM_USE_V2_MODEL_RUNNER": vllm_config.use_v2_model_runner
            and getattr(vllm_config.speculative_config, "method", None) in HEADS,
            "VLLM_LORA_ENABLE_DUAL_STREAM": lora is not None
            and parallel.tensor_parallel_size > 1
            and envs.VLLM_LORA_ENABLE_DUAL_STREAM,
        }
    )
    model = vllm_config.model_config
    if model.use_mla:
        raise UnsupportedError(f"{model.model} uses MLA attention, which PTE does not support")
    if model.is_encoder_decoder:
        raise UnsupportedError(f"{model.model} has cross-attention, which PTE does not support")
    check_block_size(vllm_config.cache_config.block_size)
    check_window(engine, vllm_config.cache_config.block_size)
    if engine.keep_tokens and engine.keep_score == "expected" and engine.probes is None:
        raise UnsupportedError(
            f"--pte-keep {engine.keep_tokens} needs a file of probes: sample one with pte-vllm "
            "adapter calibrate, and name it with --pte-probes"
        )


def _default_block_size() -> int | None:
    """Return what vLLM takes without --block-size; None on a GPU, where its backend decides."""
    from vllm.platforms import current_platform

    return CPU_BLOCK_SIZE if current_platform.is_cpu() else None


def check_block_size(block_size: int) -> None:
    """Raise UnsupportedError unless attention on this machine's CPU can read blocks of this size.

    vLLM's CPU backend would fail while the worker sets up its cache. On a GPU the backend that vLLM
    chooses decides, and vLLM splits blocks for it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from pte_vllm.engine.attention import PTECPUAttentionBackend

    bases = [
        size if isinstance(size, int) else size.base
        for size in PTECPUAttentionBackend.get_supported_kernel_block_sizes()
    ]
    if all(block_size % base for base in bases):
        smallest = min(bases)
        raise UnsupportedError(
            f"--block-size {block_size} is not supported with PTE: attention on a CPU reads blocks "
            f"of a multiple of {smallest} tokens, such as {smallest}, {2 * smallest}, "
            f"{4 * smallest}"
        )


def check_cpu_cache(dtype: str, block_size: int) -> None:
    """Raise UnsupportedError where vLLM's attention on this machine's CPU has no 8-bit caches.

    vLLM says so itself, but only once its worker has loaded the model.
    """
    from vllm.platforms import current_platform

    if dtype not in FLOAT8_CACHES or not current_platform.is_cpu():
        return
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    try:
        _get_attn_isa(torch.bfloat16, block_size, None, dtype)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"--kv-cache-dtype {dtype} is not supported on this machine: {error} Use auto"
        ) from error


def check_window(engine: EngineConfig, block_size: int) -> None:
    """Raise UnsupportedError unless the default window, and what is kept, fit the block size."""
    try:
        engine.plan(pin_tokens=0, block_size=block_size)
    except ValueError as error:
        if str(error).startswith("keep"):
            raise UnsupportedError(
                f"--pte-keep {engine.keep_tokens}: {error}; choose another --pte-keep or "
                "--block-size"
            ) from error
        raise UnsupportedError(
            f"--pte-window {engine.window_tokens}: {error}; choose another --pte-window or "
            "--block-size"
        ) from error


def _backend(weight_transfer: Any) -> str | None:
    return None if weight_transfer is None else str(getattr(weight_transfer, "backend", "given"))


def _draft_method(config: Any) -> str:
    """Return how drafts are made, unless that is supported; empty without drafts."""
    if config is None:
        return ""
    method = config.get("method") if isinstance(config, Mapping) else config.method
    if method in SUPPORTED_DRAFTS:
        return ""
    return f"method {method}" if method else "with a draft model"


def _unreadable(dtype: str) -> str | None:
    return None if dtype in (*_PLAIN_CACHES, *FLOAT8_CACHES) else dtype


def _skipped(dtype: str, layers: Sequence[str] | None) -> str:
    """Return the layers whose cache is not quantised where others are."""
    return ",".join(layers or ()) if dtype in FLOAT8_CACHES else ""


def refused_flags() -> Mapping[str, str]:
    """Return what is refused at start, by flag or variable, with the reason."""
    return _REASONS
