"""One attention layer of vLLM with PTE's backend and a small cache, made without an engine.

It shows on any machine, in a second and without a model, what an engine would find out when it
starts: which backend vLLM takes, which cache manager, and the order of numbers in a block.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.utils import customize_attention_spec

from pte_vllm.engine.cache import PTEManager, PTESpec
from pte_vllm.engine.paged import PagedCaches

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


def platform_name() -> str:
    """Say in words what vLLM takes this machine for."""
    return f"{current_platform.device_name} ({type(current_platform).__name__})"


@dataclass(frozen=True)
class TrialAttention:
    """The layer with its cache, and the KV cache spec that an engine would get for it."""

    layer: Any
    spec: Any

    @property
    def backend(self) -> str:
        """Name and place of the attention backend that vLLM chose."""
        backend = self.layer.attn_backend
        return f"{backend.get_name()}, {backend.__module__}.{backend.__qualname__}"

    @property
    def is_ours(self) -> bool:
        """Whether that backend is PTE's, which alone makes a spec of PTE's."""
        return isinstance(self.spec, PTESpec)

    @property
    def other_manager(self) -> str | None:
        """The class that vLLM would manage this cache with, if it is not PTE's."""
        manager = KVCacheSpecRegistry.get_manager_class(self.spec)
        return None if manager is PTEManager else str(manager)

    @property
    def block_sizes(self) -> list[str]:
        """What `--block-size` may be, in words."""
        sizes = self.layer.attn_backend.get_supported_kernel_block_sizes()
        return [str(s) if isinstance(s, int) else f"multiples of {s.base}" for s in sizes]

    @property
    def isa(self) -> str:
        """Name of the instructions that the order of a block is made for; `plain` on a GPU."""
        isa: str = getattr(self.layer, "isa", "plain")
        return isa

    def check_round_trip(self) -> None:
        """Write random keys and values as vLLM does, and read them back as a fold does.

        Raises:
            RuntimeError: unless they come back exactly.
        """
        paged = PagedCaches.of({0: self.layer}, 1)
        cache, block_size = paged.caches[0], self.spec.block_size
        order = torch.tensor([3, 1], device=cache.device)
        within = torch.arange(block_size, device=cache.device)
        slots = (order[:, None] * block_size + within).flatten()
        shape = (2, len(slots), _KV_HEADS, HEAD_SIZE)  # keys and values
        # What the cache can hold, of 8 bits too: the scales of this layer are 1.
        written = torch.randn(shape, device=cache.device).to(cache.dtype).to(self.layer.dtype)
        key, value = (part.contiguous() for part in written)
        self.layer.impl.do_kv_cache_update(self.layer, key, value, self.layer.kv_cache, slots)
        read = paged.layout.gather([cache], order, paged.scales_of([0]))
        found = torch.stack([part[0] for part in read])
        if not torch.equal(found, written.float()):
            raise RuntimeError("what was written does not come back")


@contextmanager
def _model_runner_v1() -> Iterator[None]:
    """Have vLLM take Model Runner V1 inside the block."""
    name = "VLLM_USE_V2_MODEL_RUNNER"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def trial_attention(
    engine_args: Mapping[str, Any], *, dtype: str, block_size: int
) -> Iterator[TrialAttention]:
    """Make the layer; it lives as long as the block. PTE must be registered with vLLM before.

    Args:
        engine_args: what turns PTE on, as `pte_vllm.serve.engine_args` has it.
        dtype: of the model, in vLLM's words, and of the cache unless `engine_args` name another.
        block_size: tokens per block.

    Raises:
        RuntimeError, ValueError, NotImplementedError: if vLLM's layer cannot do this size.
    """
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(_CONFIG))
        args: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": dtype,
            "block_size": block_size,
            "enforce_eager": True,
            **engine_args,
        }
        with _model_runner_v1():  # V2, if asked for, has needs of its own, and no part in this
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
            dtype=layer.kv_cache_torch_dtype,
            device=device,
        )
        yield TrialAttention(layer, spec)
