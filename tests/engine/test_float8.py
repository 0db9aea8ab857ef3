"""8-bit caches before an engine starts: the self-check's layer, and what a token weighs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from pte_vllm.engine.trial_attention import trial_attention
from pte_vllm.method.options import EngineConfig
from pte_vllm.plugin import register
from pte_vllm.serve import engine_args
from pte_vllm.server.endpoint_plugin import _kv_bytes_per_token
from tests.harness import float8
from tests.harness.engine import Engine

SCALES = (0.25, 1.5)


@pytest.mark.parametrize("kernels", ["stand-in", pytest.param("vllm", marks=float8.needs_kernels)])
@pytest.mark.parametrize("kind", float8.DTYPES)
def test_random_values_read_back(kind: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "stand-in":
        float8.install(monkeypatch)
    register()
    args = {**engine_args(EngineConfig()), "kv_cache_dtype": kind}
    with trial_attention(args, dtype="float32", block_size=64) as trial:
        assert trial.layer.kv_cache.dtype == torch.uint8 and trial.is_ours
        trial.check_round_trip()


def test_what_a_token_weighs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny("llama")
    numbers = 2 * 3 * 2 * 32  # keys and values, layers, KV heads, head size
    for kind, size in (("auto", 4), ("bfloat16", 2), ("fp8", 1), ("fp8_e5m2", 1)):
        args = EngineArgs(model=str(model), dtype="float32", kv_cache_dtype=kind)
        assert _kv_bytes_per_token(args.create_engine_config()) == numbers * size
    scaled = _with_scales(model, tmp_path / "scaled", "tensor")
    config = EngineArgs(model=str(scaled), dtype="float32").create_engine_config()
    assert _kv_bytes_per_token(config) == numbers


def test_scales_of_a_checkpoint(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a checkpoint asks for 8 bits where the flag leaves it to the model."""
    float8.install(monkeypatch)
    engine = Engine(_with_scales(tiny("llama"), tmp_path / "one", "tensor"), window_tokens=64)
    try:
        paged = engine.runner.pte_evicted.paged
        assert {cache.dtype for cache in paged.caches.values()} == {torch.float8_e4m3fn}
        assert torch.equal(paged.scales_of([0, 1, 2]), torch.tensor([SCALES, SCALES, SCALES]))
        assert engine.runner.pte_kept.caches[0] is paged.caches[0]
    finally:
        engine.close()
    with pytest.raises(ValueError, match="each of 2 heads"):
        Engine(_with_scales(tiny("llama"), tmp_path / "per-head", "attn_head"), window_tokens=64)


def _with_scales(model: Path, copy: Path, strategy: str) -> Path:
    """Copy a tiny Llama into a checkpoint with scales, as llm-compressor writes them."""
    shutil.copytree(model, copy)
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {**scheme, "dynamic": False},
        "total_num_heads": 4,
        "total_num_kv_heads": 2,
    }
    (copy / "config.json").write_text(json.dumps(config))
    (file,) = copy.glob("*.safetensors")
    scales = {
        f"model.layers.{i}.self_attn.{side}_scale": torch.full(
            (2 if strategy == "attn_head" else 1,), scale
        )
        for i in range(3)
        for side, scale in zip("kv", SCALES, strict=True)
    }
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    return copy
