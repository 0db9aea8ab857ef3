"""What cannot work is refused with a message that names the option; the engine lives on."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.exceptions import VLLMValidationError

from pte_vllm.engine.refusals import CPU_BLOCK_SIZE, UnsupportedError, check_serve_args
from pte_vllm.method.options import EngineConfig
from pte_vllm.serve import parse_vllm_args, resolve_config
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen2")


def test_pool_is_known_before_the_first_step(engine: Engine) -> None:
    report = engine.worker.pte_requests()
    assert report["usable_blocks"] == report["free_blocks"] == 30


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("pte_window", 33, "multiple"),
        ("pte_window", BLOCK, "less than two blocks"),
        ("pte_window", -BLOCK, "must not be negative"),
        ("pte_window", "wide", "must be an integer"),
        ("pte_window", True, "must be an integer"),
        ("pte_pin_tokens", 41, "beyond the prompt"),
        ("pte_pin_tokens", -1, "must not be negative"),
        ("pte_update", "median", "paper, sum, none, ridge, delta"),
        ("pte_update", "sum", "needs a PTE adapter"),
        ("pte_windows", 64, "unknown option"),
    ],
)
def test_bad_request_options(engine: Engine, option: str, value: object, message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message) as error:
        engine.run([Job(random_tokens(40, 500, 0), 5, options={option: value})])
    assert option in str(error.value)
    engine.run([Job(random_tokens(40, 500, 0), 5)])
    engine.check_idle()


def test_ridge_needs_a_square_state(
    engine: Engine, model: Path, adapters: Callable[..., Path]
) -> None:
    adapter = lora("tall", adapters(model, rank=6, global_tokens=8, rule="paper"), 79)
    with pytest.raises(VLLMValidationError, match="ridge needs global_tokens equal to rank"):
        engine.run([Job(random_tokens(40, 500, 0), 5, adapter, {"pte_update": "ridge"})])
    engine.run([Job(random_tokens(40, 500, 0), 5, adapter, {"pte_update": "sum"})])
    engine.check_idle()


def test_request_larger_than_the_pool(engine: Engine) -> None:
    with pytest.raises(VLLMValidationError, match="KV cache blocks, but the pool has 30"):
        engine.run([Job(random_tokens(40, 500, 0), 2000, options={"pte_window": 0})])


def test_pinned_part_beyond_the_bound(engine: Engine) -> None:
    with pytest.raises(VLLMValidationError, match="--pte-max-prompt-tokens 256"):
        engine.run([Job(random_tokens(300, 500, 0), 5)])
    engine.run([Job(random_tokens(300, 500, 0), 5, options={"pte_pin_tokens": 256})])
    engine.check_idle()


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    engine = Engine(
        model, window_tokens=4 * BLOCK, num_blocks=30, lora_rank=8, max_prompt_tokens=256
    )
    yield engine
    engine.close()


def _edit_config(directory: Path, **changes: object) -> None:
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    config["pte"].update(changes)
    file.write_text(json.dumps(config))


def _edit_peft(directory: Path, **changes: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _edit_tensor(directory: Path, name: str, change: Callable | None, part: str = "") -> None:
    """Change the first tensor whose name contains `part`, or remove it."""
    tensors = load_file(directory / name)
    key = next(k for k in sorted(tensors) if part in k)
    value = tensors.pop(key)
    if change is not None:
        tensors[key] = change(value)
    save_file(tensors, directory / name)


BROKEN = {
    "unknown rule": lambda d: _edit_config(d, rule="median"),
    "rank unlike PEFT's": lambda d: _edit_peft(d, r=4),
    "rank pattern": lambda d: _edit_peft(d, rank_pattern={"q_proj": 4}),
    "unknown format": lambda d: _edit_config(d, format_version=9),
    "NaN in the encoder": lambda d: _edit_tensor(
        d, "pte_encoder.safetensors", lambda t: torch.full_like(t, float("nan"))
    ),
    "missing encoder tensor": lambda d: _edit_tensor(d, "pte_encoder.safetensors", None, "w_k"),
    "wrong shape": lambda d: _edit_tensor(
        d, "adapter_model.safetensors", lambda t: t[:, :-1].contiguous()
    ),
    "truncated file": lambda d: (d / "pte_encoder.safetensors").write_bytes(b"half"),
    "no encoder": lambda d: (d / "pte_encoder.safetensors").unlink(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapters(
    engine: Engine, model: Path, adapters: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(adapters(model, rank=8, rule="paper"), directory)
    BROKEN[kind](directory)
    with pytest.raises(ValueError, match=str(directory)):
        engine.engine.add_lora(lora("broken", directory, 77))
    assert 77 not in engine.engine.list_loras()
    engine.run([Job(random_tokens(40, 500, 0), 5)])
    engine.check_idle()


def test_rank_beyond_the_engine(engine: Engine, model: Path, adapters: Callable) -> None:
    with pytest.raises(ValueError, match="--max-lora-rank"):
        engine.engine.add_lora(lora("big", adapters(model, rank=16, rule="paper"), 78))


def _serve_args(**changes: object) -> Namespace:
    args = {
        "speculative_config": None,
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "kv_transfer_config": None,
        "kv_cache_dtype": "auto",
        "fully_sharded_loras": False,
        "enable_dbo": False,
        "block_size": 32,
    }
    return Namespace(**{**args, **changes})


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"speculative_config": {"method": "medusa"}}, "--speculative-config method medusa"),
        ({"speculative_config": {"model": "x"}}, "--speculative-config with a draft model"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"data_parallel_rank": 0}, "--data-parallel-rank 0"),
        ({"data_parallel_hybrid_lb": True}, "--data-parallel-hybrid-lb"),
        ({"kv_transfer_config": {"kv_connector": "x"}}, "--kv-transfer-config"),
        (
            {"kv_cache_dtype": "fp8_per_token_head"},
            "--kv-cache-dtype fp8_per_token_head .* fp8_e4m3",
        ),
        ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4"),
        ({"kv_cache_dtype": "turboquant_4bit_nc"}, "--kv-cache-dtype turboquant_4bit_nc"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "2"]},
            "--kv-cache-dtype-skip-layers 0,2 .* differ in size",
        ),
        ({"fully_sharded_loras": True}, "--fully-sharded-loras"),
        (
            {"weight_transfer_config": Namespace(backend="nccl")},
            "--weight-transfer-config nccl .* PUT /pte/v1/adapters",
        ),
        ({"block_size": 16}, "--block-size 16 .* such as 32, 64, 128"),
        ({"block_size": 48}, "--block-size 48"),
        ({"block_size": 96}, "--pte-window"),
        ({"block_size": None, "window": 1000}, "--pte-window 1000: .* 128"),
    ],
)
def test_unsupported_flags(change: dict, flag: str) -> None:
    check_serve_args(_serve_args(), EngineConfig())
    check_serve_args(_serve_args(block_size=None), EngineConfig())
    window = change.pop("window", EngineConfig.window_tokens)
    with pytest.raises(UnsupportedError, match=flag):
        check_serve_args(_serve_args(**change), EngineConfig(window_tokens=window))


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_8_bit_caches_need_a_cpu_that_has_them(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = _serve_args(kv_cache_dtype=dtype)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    check_serve_args(args, EngineConfig())
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(UnsupportedError, match=f"--kv-cache-dtype {dtype} .* AVX-512 or AMX"):
        check_serve_args(args, EngineConfig())


def test_block_size_that_vllm_takes_by_default(tiny: Callable[[str], Path]) -> None:
    args, _ = parse_vllm_args(str(tiny("qwen2")), EngineConfig(), [])
    assert resolve_config(args).cache_config.block_size == CPU_BLOCK_SIZE


def test_unsupported_models_and_windows(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The engine itself refuses, too: here a sliding-window model and a window of odd size."""
    sliding = tmp_path / "sliding"
    shutil.copytree(tiny("mistral"), sliding)
    config = json.loads((sliding / "config.json").read_text())
    config["sliding_window"] = 64
    (sliding / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="liding-window"):
        Engine(sliding)
    with pytest.raises(ValueError, match="--pte-window 100"):
        Engine(tiny("llama"), window_tokens=100)
