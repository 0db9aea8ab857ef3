"""Attention as an engine would set it up: backend, block sizes, and the order of a KV cache block.

No model is loaded: one real attention layer of vLLM is made for a tiny configuration.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pte_vllm.doctor.report import Check, broken, ok
from pte_vllm.method.options import EngineConfig

DTYPES = ("float32", "bfloat16", "float16")
BLOCK_SIZES = (32, 64, 128)
HEAD_SIZE = 64
_HEADS, _KV_HEADS, _NUM_BLOCKS = 4, 2, 4
_NAME = "model.layers.0.self_attn.attn"
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HEADS * HEAD_SIZE,
    "head_dim": HEAD_SIZE,
    "intermediate_size": 64,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
}


def platform_and_backend() -> Iterator[Check]:
    """What vLLM takes this machine for, and which attention it would use with our options."""
    from vllm.platforms import current_platform

    from pte_vllm.engine.cache import PTESpec

    yield ok("platform", f"{current_platform.device_name} ({type(current_platform).__name__})")
    with _attention("float32", BLOCK_SIZES[0]) as (layer, spec):
        backend = layer.attn_backend
        where = f"{backend.get_name()}, {backend.__module__}.{backend.__qualname__}"
        if not isinstance(spec, PTESpec):
            yield broken(
                "attention backend",
                f"{where}: it is not ours",
                "another plugin took its place: see VLLM_PLUGINS and --attention-backend",
            )
            return
        yield ok("attention backend", where)
        yield _manager(spec)
        sizes = ", ".join(map(_size, backend.get_supported_kernel_block_sizes()))
        yield ok("block sizes", f"{sizes} (--block-size)")


def _manager(spec: Any) -> Check:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from pte_vllm.engine.cache import PTEManager

    manager = KVCacheSpecRegistry.get_manager_class(spec)
    if manager is PTEManager:
        return ok("KV cache manager", "PTEManager")
    return broken(
        "KV cache manager", f"{manager} in place of PTEManager", "see VLLM_PLUGINS: another plugin?"
    )


def _size(size: Any) -> str:
    return str(size) if isinstance(size, int) else f"multiples of {size.base}"


def kv_layout() -> Iterator[Check]:
    """Find the order of a block as an engine does at its start, and read random values back."""
    for dtype in DTYPES:
        works: dict[str, list[int]] = {}
        for block_size in BLOCK_SIZES:
            try:
                with _attention(dtype, block_size) as (layer, _):
                    _check_round_trip(layer, block_size)
            # All three mean that vLLM's layer, or our reading of it, cannot do this size.
            except (RuntimeError, ValueError, NotImplementedError) as error:
                yield broken(
                    f"KV layout {dtype}",
                    f"blocks of {block_size}: {error}",
                    "serve with another --dtype or --block-size, and report this",
                )
            else:
                works.setdefault(getattr(layer, "isa", "plain"), []).append(block_size)
        for isa, sizes in works.items():
            yield ok(f"KV layout {dtype}", f"{isa}: blocks of {sizes} tokens read back exactly")


def _check_round_trip(layer: Any, block_size: int) -> None:
    """Raise RuntimeError unless keys and values come back as they were written."""
    import torch

    from pte_vllm.kernels.cache_layout import BlockLayout

    cache = layer.kv_cache
    layout = BlockLayout.probe(layer)
    order = torch.tensor([3, 1], device=cache.device)
    within = torch.arange(block_size, device=cache.device)
    slots = (order[:, None] * block_size + within).flatten()
    shape = (2, len(slots), _KV_HEADS, HEAD_SIZE)
    written = torch.randn(shape, device=cache.device).to(cache.dtype)
    key, value = (part.contiguous() for part in written)
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    found = torch.stack([part[0] for part in layout.gather([cache], order)])
    if not torch.equal(found, written.float()):
        raise RuntimeError("what was written does not come back")


@contextmanager
def _attention(dtype: str, block_size: int) -> Iterator[tuple[Any, Any]]:
    """A layer of vLLM with its cache, and the KV cache spec that the engine would get."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.utils import customize_attention_spec

    from pte_vllm.plugin import register
    from pte_vllm.serve import engine_args

    register()
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(_CONFIG))
        args: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": dtype,
            "block_size": block_size,
            "enforce_eager": True,
            **engine_args(EngineConfig()),
        }
        config: Any = EngineArgs(**args).create_engine_config()
    device, before = torch.device(config.device_config.device), torch.get_default_dtype()
    with set_current_vllm_config(config):
        torch.set_default_dtype(config.model_config.dtype)  # as vLLM does around a model
        try:
            layer = Attention(
                _HEADS,
                HEAD_SIZE,
                HEAD_SIZE**-0.5,
                num_kv_heads=_KV_HEADS,
                cache_config=config.cache_config,
                prefix=_NAME,
            ).to(device)
        finally:
            torch.set_default_dtype(before)
        full: Any = layer.get_kv_cache_spec(config)
        spec = customize_attention_spec(layer.attn_backend, full)
        # On CPU the builder tells its layers the order of a block.
        layer.attn_backend.get_builder_cls()(spec, [_NAME], config, device)
        layer.kv_cache = torch.zeros(
            _NUM_BLOCKS,
            _KV_HEADS,
            block_size,
            2 * HEAD_SIZE,
            dtype=config.model_config.dtype,
            device=device,
        )
        yield layer, spec
